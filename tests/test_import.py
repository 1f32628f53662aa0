"""What an import may load, in fresh processes."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import kvconnect
from kvconnect import registry

# Looked for, not imported: that would take longer than all other tests here.
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def loaded_by(code: str, env: dict[str, str] | None = None) -> set[str]:
    """Run code in a fresh process and return the modules it has loaded at its end."""
    report = "\nimport sys; print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], check=False, capture_output=True, text=True, timeout=220, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import kvconnect",
        "import kvconnect, kvconnect.errors, kvconnect.config, kvconnect.registry, kvconnect._plugin, kvconnect.cli",
        "from kvconnect import Config, KVConnectError",
        "from kvconnect import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_the_package_loads_without_torch_vllm_or_zmq(code):
    assert not {"torch", "vllm", "zmq", "numpy", "msgpack"} & loaded_by(code)


def test_the_proxy_loads_without_torch_vllm_or_zmq():
    assert not {"torch", "vllm", "zmq", "numpy"} & loaded_by("import kvconnect.proxy.serve")


def test_the_contracts_load_without_torch_or_vllm():
    code = "from kvconnect import Grant, LookupBuffer, LookupKey, Pipe, PipeSpec, Traits, Transfer"
    assert not {"torch", "vllm", "zmq"} & loaded_by(code)


def test_laws_peers_and_faults_load_without_pytest_or_vllm():
    names = ["block_laws", "buffer_laws", "faults", "leaks", "pipe_laws", "process_laws", "stream_laws"]
    code = "import " + ", ".join(f"kvconnect.testing.{name}" for name in names)
    assert not {"pytest", "vllm"} & loaded_by(code)


def test_every_public_name_resolves_and_is_listed():
    for name in kvconnect.__all__:
        assert getattr(kvconnect, name) is not None
        assert name in dir(kvconnect)
    with pytest.raises(AttributeError, match="has no attribute 'nothing_like_it'"):
        _ = kvconnect.nothing_like_it


def test_the_version_is_the_distributions():
    assert importlib.metadata.version("kvconnect") == kvconnect.__version__


@needs_vllm
@pytest.mark.timeout(240)
def test_connectors_load_without_a_gpu_and_without_any_medium():
    loaded = loaded_by(
        "import kvconnect.connectors.named\nimport torch\nassert not torch.cuda.is_initialized()",
    )
    assert "vllm" in loaded
    assert not {f"kvconnect.pipes.{medium}" for medium in ("inproc", "shm", "tcp")} & loaded
    assert not {"cupy", "nixl"} & loaded


def medium_of(module: str, media: set[str]) -> str | None:
    """Return the medium that a module belongs to: its own name, or its name's beginning."""
    return next((m for m in media if module == m or module.startswith(f"{m}_")), None)


def imported_pipes(source: str) -> set[str]:
    """Return the modules of ``kvconnect.pipes`` that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[2] for name in names if name.startswith("kvconnect.pipes.")}
    return found


def test_no_module_of_a_medium_imports_one_of_another():
    room = Path(kvconnect.__file__).parent / "pipes"
    media = {name for name, entry in registry.pipes().items() if entry.distribution == "kvconnect"}
    assert imported_pipes("import kvconnect.pipes.tcp\nfrom kvconnect.pipes.shm_lane import x") == {"tcp", "shm_lane"}
    for path in room.glob("*.py"):
        own = medium_of(path.stem, media)
        others = {medium_of(module, media) for module in imported_pipes(path.read_text())} - {None, own}
        assert not others, f"{path.name} imports {others}"
