"""What authors of pipes and buffers are shown is a pipe and a buffer."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest

from bench.report import ROOT
from tests.docs import pages

PIPE, BUFFER = ROOT / "docs" / "write-a-pipe.md", ROOT / "docs" / "write-a-buffer.md"
EXAMPLE = ROOT / "examples" / "third_party_pipe"


@pytest.fixture
def installed(tmp_path):
    """Write both pages' files to a folder, with the metadata that installing them would leave there."""
    for name, text in (pages.modules(PIPE) | pages.modules(BUFFER)).items():
        (tmp_path / name).write_text(text, "utf-8")
    info = tmp_path / "shown-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shown\nVersion: 1.0\n", "utf-8")
    for text in (metadata(PIPE), metadata(BUFFER)):
        ((group, entries),) = tomllib.loads(text)["project"]["entry-points"].items()
        with (info / "entry_points.txt").open("a", encoding="utf-8") as file:
            file.writelines([f"[{group}]\n", *(f"{name} = {target}\n" for name, target in entries.items())])
    return tmp_path


def metadata(page):
    """Return the `pyproject.toml` that a page shows, or the part of it."""
    (text,) = (block.text for block in pages.blocks(page) if block.language == "toml")
    return text


def run(folder, *arguments):
    """Run Python in the folder, with warnings as errors where that is pytest's to say."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def suite(folder, file, *options):
    quiet = ("-q", "-p", "no:randomly", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")
    done = run(folder, "pytest", *quiet, *options, file)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pipes_page_shows_the_example():
    named = "# unix_pipe.py\n" + (EXAMPLE / "unix_pipe.py").read_text("utf-8")
    assert pages.modules(PIPE)["unix_pipe.py"] == named
    assert metadata(PIPE) == (EXAMPLE / "pyproject.toml").read_text("utf-8")


def test_both_are_listed_once_they_are_installed(installed):
    listed = run(installed, "kvconnect", "list").stdout
    for name in ("unix", "dict"):
        assert any(line.split()[1:5] == [name, "yes", "shown", "1.0"] for line in listed.splitlines()), listed


@pytest.mark.slow  # as the example's package, it is held to them in tests/test_third_parties.py
@pytest.mark.timeout(450)
def test_the_pipe_keeps_every_law_between_two_ends_of_one_process(installed):
    assert "failed" not in suite(installed, "test_unix_pipe.py", "-k", "not process_law")


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_the_pipe_keeps_every_law_between_two_processes(installed):
    assert "failed" not in suite(installed, "test_unix_pipe.py", "-k", "process_law")


@pytest.mark.timeout(450)
def test_the_buffer_keeps_every_law_of_its_traits(installed):
    assert "failed" not in suite(installed, "test_dict_buffer.py")
