"""The packages of third parties under `examples/`: built as wheels, and installed beside kvconnect's own.

Everything runs in a fresh environment, which knows this tree by its wheel only. What is heavy (torch,
vLLM) is read from the environment that runs the tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {"pipe": "unix", "buffer": "sqlite"}
UV = Path(sys.executable).with_name("uv")

pytestmark = [
    pytest.mark.skipif(not UV.exists(), reason="builds wheels with uv, which `make venv` installs"),
    pytest.mark.timeout(600),
]


def run(*command: str | Path, cwd: Path, limit_s: float = 300.0) -> str:
    """Run a command without this tree on its path, and return what it prints."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment into which all three wheels are installed."""
    folder = tmp_path_factory.mktemp("third-parties")
    for source in (ROOT, *(ROOT / "examples" / f"third_party_{kind}" for kind in EXAMPLES)):
        run(UV, "build", "--quiet", "--wheel", "--out-dir", folder / "wheels", source, cwd=folder)
    run(UV, "venv", "--quiet", "--python", sys.executable, folder / "venv", cwd=folder)
    found = folder / "venv" / "bin" / "python"
    wheels = sorted((folder / "wheels").glob("*.whl"))
    run(UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", found, *wheels, cwd=folder)
    heavy = importlib.util.find_spec("torch")
    assert heavy is not None
    assert heavy.origin is not None
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (site / "heavy.pth").write_text(f"{Path(heavy.origin).parents[1]}\n")
    return found


def test_kvconnect_and_both_packages_come_from_their_wheels(python: Path, tmp_path: Path) -> None:
    for module in ("kvconnect", "unix_pipe", "sqlite_buffer"):
        file = run(python, "-c", f"import {module}; print({module}.__file__)", cwd=tmp_path)
        assert file.startswith(str(python.parents[1]))


@pytest.mark.parametrize(("kind", "name"), EXAMPLES.items())
def test_what_a_third_party_registers_is_listed_as_built_in_ones_are(
    python: Path, tmp_path: Path, kind: str, name: str
) -> None:
    rows = json.loads(run(python, "-m", "kvconnect", "list", "--json", cwd=tmp_path))
    (row,) = [row for row in rows if (row["kind"], row["name"]) == (kind, name)]
    assert row["available"]
    assert row["distribution"] == f"kvconnect-{name}-{kind}"


@pytest.mark.slow  # an environment of its own, and every law
@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_suite_passes_over_a_third_partys_package(python: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(ROOT / "examples" / f"third_party_{kind}" / "tests", tmp_path / "tests")
    # Of the plugins that the outer environment has, none is needed.
    options = ("-p", "no:randomly", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", tmp_path, "-q")
    said = run(python, "-m", "pytest", *options, tmp_path / "tests", cwd=tmp_path, limit_s=550.0)
    assert " passed" in said


@pytest.mark.parametrize(("kind", "name"), EXAMPLES.items())
def test_a_package_has_under_60_lines(kind: str, name: str) -> None:
    lines = (ROOT / "examples" / f"third_party_{kind}" / f"{name}_{kind}.py").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith(("import ", "from "))]) < 60


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_third_partys_pipe_carries_real_hand_overs(python: Path, tmp_path: Path) -> None:
    said = run(python, "-m", "kvconnect", "demo", "--pipe", "unix", "--logs", tmp_path, cwd=tmp_path, limit_s=900.0)
    assert " unix " in said
    assert "every output equals that of one engine" in said


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_third_partys_buffer_carries_real_hand_overs(python: Path, tmp_path: Path) -> None:
    said = run(python, "-P", ROOT / "tests" / "table_engines.py", tmp_path, cwd=tmp_path, limit_s=900.0)
    assert "every output equals that of one engine" in said
