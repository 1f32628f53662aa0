"""Look-up by name, with real distributions on the path."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvconnect import registry
from kvconnect.errors import ConfigError, UnavailableBackendError, UnknownBackendError

BUILT_IN = {
    "pipe": {"inproc", "shm", "tcp"},
    "buffer": {"filesystem", "memory", "redis", "remote"},
    "connector": {
        "KvConnect",
        "KvConnectCudaIpc",
        "KvConnectFilesystem",
        "KvConnectNccl",
        "KvConnectNixl",
        "KvConnectRedis",
        "KvConnectShm",
        "KvConnectTcp",
    },
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return ``install(distribution, entry_points, **modules)``, which puts a distribution on the path."""

    def install(distribution: str, entry_points: str, **modules: str) -> Path:
        site = tmp_path / distribution
        info = site / f"{distribution}-1.2.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        for name, source in modules.items():
            (site / f"{name}.py").write_text(textwrap.dedent(source))
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(site)
        return site

    return install


@pytest.mark.parametrize("kind", registry.GROUPS)
def test_built_ins_are_entry_points_of_kvconnect(kind):
    entries = {"pipe": registry.pipes, "buffer": registry.buffers, "connector": registry.connectors}[kind]()
    assert BUILT_IN[kind] <= entries.keys()
    for name in BUILT_IN[kind]:
        entry = entries[name]
        assert (entry.name, entry.kind, entry.distribution) == (name, kind, "kvconnect")
        assert entry.version


def test_a_module_is_named_after_its_medium():
    for name in BUILT_IN["pipe"]:
        assert registry.pipes()[name].module == f"kvconnect.pipes.{name}"
        assert registry.pipe(name).name == name


def test_a_third_partys_pipe_is_found_beside_the_built_ins(install):
    install("pigeons", "[kvconnect.pipes]\npigeon = pigeon_post:PigeonPipe\n", pigeon_post="class PigeonPipe: pass\n")
    entry = registry.pipes()["pigeon"]
    assert (entry.distribution, entry.version, entry.value) == ("pigeons", "1.2", "pigeon_post:PigeonPipe")
    assert registry.pipe("pigeon").__name__ == "PigeonPipe"
    assert BUILT_IN["pipe"] <= registry.pipes().keys()


def test_extras_of_an_entry_point_are_no_part_of_its_target(install):
    install("pigeons", "[kvconnect.connectors]\nPigeon = pigeon_post:Pigeon [fast]\n")
    assert registry.connector_target("Pigeon") == ("pigeon_post", "Pigeon")


def test_two_distributions_with_one_name_are_both_named(install):
    install("doves", "[kvconnect.pipes]\npigeon = dove_post:DovePipe\n")
    install("pigeons", "[kvconnect.pipes]\npigeon = pigeon_post:PigeonPipe\n")
    with pytest.raises(ConfigError, match=r"pipe 'pigeon' is registered by both .*; uninstall one of them") as caught:
        registry.pipe("pigeon")
    assert "doves 1.2" in str(caught.value)
    assert "pigeons 1.2" in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest_and_all_others():
    with pytest.raises(UnknownBackendError) as caught:
        registry.pipe("tpc")
    assert "unknown pipe 'tpc'; did you mean 'tcp'? (registered: " in str(caught.value)
    assert BUILT_IN["pipe"] <= set(caught.value.registered)
    with pytest.raises(UnknownBackendError, match="unknown buffer 'xyzzy' "):
        registry.buffer("xyzzy")
    with pytest.raises(UnknownBackendError, match="did you mean 'KvConnectTcp'"):
        registry.connector_target("KVConnectTCP")


@pytest.mark.parametrize(
    ("source", "reason", "cure", "cause"),
    [
        ("import no_such_wings\n", "it needs the module 'no_such_wings'", "install 'no_such_wings'", ImportError),
        ("import pigeon_post.wings\n", r"pigeons 1\.2 does not have|it needs the module", "install", ImportError),
        ("class Other: pass\n", "pigeons 1.2 does not have pigeon_post:PigeonPipe", "reinstall", AttributeError),
        ("raise OSError('libwings.so: no')\n", "OSError: libwings.so: no", None, OSError),
        ("raise ImportError('libwings.so: no')\n", "ImportError: libwings.so: no", None, ImportError),
        ("PigeonPipe = 7\n", "pigeon_post:PigeonPipe is not a class", None, None),
    ],
)
def test_what_cannot_be_imported_is_unavailable_with_its_cause(install, source, reason, cure, cause):
    install("pigeons", "[kvconnect.pipes]\npigeon = pigeon_post:PigeonPipe\n", pigeon_post=source)
    with pytest.raises(UnavailableBackendError, match=reason) as caught:
        registry.pipe("pigeon")
    assert str(caught.value).startswith("pipe 'pigeon' is not available: ")
    assert cure is None or cure in caught.value.cure
    assert cause is None or isinstance(caught.value.__cause__, cause)


def test_a_missing_module_of_its_own_is_a_broken_installation(install):
    install("pigeons", "[kvconnect.buffers]\nloft = pigeon_loft:Loft\n")
    with pytest.raises(UnavailableBackendError, match=r"pigeons 1\.2 does not have pigeon_loft:Loft") as caught:
        registry.buffer("loft")
    assert caught.value.cure == "reinstall pigeons"


def test_what_says_no_itself_is_unavailable_in_its_own_words(install):
    source = """
        from kvconnect.pipes.base import Verdict

        class PigeonPipe:
            @classmethod
            def availability(cls):
                return Verdict(False, "it is raining", "wait for the sun")
    """
    install("pigeons", "[kvconnect.pipes]\npigeon = pigeon_post:PigeonPipe\n", pigeon_post=source)
    with pytest.raises(UnavailableBackendError) as caught:
        registry.pipe("pigeon")
    assert str(caught.value) == "pipe 'pigeon' is not available: it is raining (wait for the sun)"


def test_an_availability_that_raises_means_no(install):
    source = """
        class PigeonPipe:
            @classmethod
            def availability(cls):
                raise RuntimeError("hawk")
    """
    install("pigeons", "[kvconnect.pipes]\npigeon = pigeon_post:PigeonPipe\n", pigeon_post=source)
    with pytest.raises(UnavailableBackendError, match=r"its availability\(\) failed: RuntimeError: hawk"):
        registry.pipe("pigeon")


def test_listing_imports_no_backend(install):
    site = install("pigeons", "[kvconnect.pipes]\npigeon = pigeon_post:X\n", pigeon_post="raise SystemExit(9)\n")
    code = (
        "import sys\n"
        "from kvconnect import registry\n"
        "assert 'pigeon' in registry.pipes()\n"
        "registry.buffers(), registry.connectors(), registry.connector_target('KvConnectTcp')\n"
        "heavy = {'torch', 'vllm', 'zmq', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not any(m.startswith(('kvconnect.pipes', 'kvconnect.buffers')) for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30, env={"PYTHONPATH": str(site)})
