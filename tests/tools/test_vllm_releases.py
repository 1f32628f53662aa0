"""What kvconnect assumes about vLLM: that the list is whole, that each item can fail, and what is committed."""

from __future__ import annotations

import ast
import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

from bench.report import between
from tests.proxy.servers import Served
from tools.vllm_releases import __main__ as command
from tools.vllm_releases import report, wheels
from tools.vllm_releases.assumptions import ASSUMPTIONS, HOOKS
from tools.vllm_releases.kinds import (
    ROOT,
    Assumption,
    BlocksCounted,
    Call,
    Called,
    Hook,
    Members,
    Name,
    OneOf,
    Says,
    facade,
)
from tools.vllm_releases.source import Tree

SPEC = importlib.util.find_spec("vllm")  # its source is looked at; importing it would take a while
if SPEC is None or SPEC.origin is None:
    pytest.skip("vLLM's source is needed", allow_module_level=True)

PACKAGES = Path(SPEC.origin).parents[1]
OURS = [*(ROOT / "kvconnect" / "connectors").glob("*.py"), ROOT / "kvconnect" / "_plugin.py"]
BASE = "vllm/distributed/kv_transfer/kv_connector/v1/base.py"
POOL = "vllm/v1/core/block_pool.py"


def parts(assumption: Assumption) -> Iterator[Assumption]:
    """Return what an assumption consists of."""
    if isinstance(assumption, OneOf):
        yield from assumption.parts
    else:
        yield assumption


ALL = [part for assumption in ASSUMPTIONS for part in parts(assumption)]


INSTALLED = Tree.folder(PACKAGES)


def doctored(path: str, edit: Callable[[str], str]) -> Tree:
    """Return the installed vLLM's source with one file changed."""
    text = (PACKAGES / path).read_text("utf-8")
    changed = edit(text)
    assert changed != text, "the doctor changed nothing"
    tree = Tree({path: changed}.get)
    own = tree.module
    tree.module = lambda name: own(name) or INSTALLED.module(name)
    return tree


# -- the list is whole -----------------------------------------------------------------


def test_every_method_that_the_facade_overrides_is_on_the_list_and_no_other():
    assert {hook.name for hook in HOOKS if isinstance(hook, Hook)} == set(facade())


def test_every_name_that_is_imported_from_vllm_is_on_the_list():
    listed = {f"{a.module}.{a.name}" for a in ALL if isinstance(a, Name)}
    listed |= {f"{a.module}.{a.cls}" for a in ALL if isinstance(a, (Members, Call))}
    modules = {module for a in ALL if (module := getattr(a, "module", None))}
    facades = {f"vllm.distributed.kv_transfer.kv_connector.v1.base.{name}" for name in ("KVConnectorBase_V1",)}
    for file in OURS:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    known = name in listed or name in modules or name in facades
                    assert known, f"{file.name} imports {name}, which tools/vllm_releases/assumptions.py does not list"


def test_what_the_list_says_is_used_is_used_there():
    for part in ALL:
        text = "".join((ROOT / "kvconnect" / path).read_text("utf-8") for path in part.used)
        names = part.names if isinstance(part, (Members, Called)) else ()
        names += (part.method,) if isinstance(part, Call) else ()
        names += (part.name,) if isinstance(part, (Name, Hook)) else ()
        assert [name for name in names if name not in text] == [], part.title


def test_titles_tell_assumptions_apart():
    titles = [assumption.title for assumption in ASSUMPTIONS]
    assert len(set(titles)) == len(titles)


# -- each item can fail ------------------------------------------------------------------


@pytest.mark.parametrize("part", ALL, ids=lambda part: part.title)
def test_an_assumption_does_not_hold_where_there_is_nothing(part):
    if isinstance(part, (Name, Members, Call, Called, Hook, Says, BlocksCounted)):
        assert part.check(Tree(lambda _: None)).state != "holds"


def test_the_installed_release_meets_them_all(capsys):
    assert command.main(["--tree", str(PACKAGES)]) == 0
    assert "1 checked, 0 assumptions broken" in capsys.readouterr().out


DOCTORED = {
    "a method takes another argument": (
        BASE,
        lambda text: text.replace("def on_new_request(self, request:", "def on_new_request(self, session, request:"),
        "on_new_request(self, session, request): ours takes (self, request)",
    ),
    "a new abstract method": (
        BASE,
        lambda text: text.replace(
            "class KVConnectorBase_V1(ABC):",
            "class KVConnectorBase_V1(ABC):\n    @abstractmethod\n    def new_duty(self): ...\n",
        ),
        "abstract and not implemented: new_duty",
    ),
    "a hook is gone": (
        BASE,
        lambda text: text.replace("def request_finished(", "def request_over("),
        "have no request_finished",
    ),
    "a class method became a method": (
        BASE,
        lambda text: text.replace(
            "@classmethod\n    def get_required_kvcache_layout(cls", "def get_required_kvcache_layout(self"
        ),
        "get_required_kvcache_layout(self, vllm_config): one of them is a class method",
    ),
    "nobody calls a hook": (
        "vllm/v1/core/sched/scheduler.py",
        lambda text: text.replace("connector.on_new_request(", "connector.on_request("),
        "nobody calls on_new_request",
    ),
    "an argument became required": (
        POOL,
        lambda text: text.replace("def reset_prefix_cache(self)", "def reset_prefix_cache(self, why)"),
        "BlockPool.reset_prefix_cache is called (self, why)",
    ),
    "an attribute has another name": (
        "vllm/v1/request.py",
        lambda text: text.replace("self.cache_salt", "self.salt"),
        "Request has no cache_salt",
    ),
    "another null block": (
        POOL,
        lambda text: text.replace(
            "self.null_block = self.free_block_queue.popleft()", "self.null_block = KVCacheBlock(-1)"
        ),
        "BlockPool.__init__ does not say `self.null_block = self.free_block_queue.popleft()`",
    ),
    "heads before blocks": (
        "vllm/v1/kv_cache_interface.py",
        lambda text: text.replace(
            "        num_blocks * blocks_per_page,\n        spec.num_heads,",
            "        spec.num_heads,\n        num_blocks * blocks_per_page,",
        ),
        "compute_layer_kv_cache_shape_bytes does not say",
    ),
}


@pytest.mark.parametrize(("path", "edit", "expected"), DOCTORED.values(), ids=DOCTORED.keys())
def test_a_release_that_lacks_something_is_named_with_what_it_lacks(path, edit, expected):
    release = report.examine("9.9.9", "", doctored(path, edit))
    (line, *others) = report.broken([release])
    assert line.startswith("vLLM 9.9.9: ")
    assert expected in line
    assert len(others) <= 4, others  # the shape is five backends'
    assert all(expected in other for other in others)


def test_the_command_fails_for_a_tree_without_vllm(tmp_path, capsys):
    assert command.main(["--tree", str(tmp_path)]) == 1
    assert "have no start_load_kv" in capsys.readouterr().out


def test_names_are_followed_through_relative_imports_and_type_checking():
    files = {
        "vllm/config/__init__.py": "if TYPE_CHECKING:\n    from .kv import Config as C\n",
        "vllm/config/kv.py": "from vllm.config.root import Root\nclass Config(Root):\n    own: int = 1\n",
        "vllm/config/root.py": "class Root:\n    def __init__(self):\n        self.far, other = 1, 2\n",
    }
    members = Tree(files.get).members("vllm.config", "C")
    assert members is not None
    assert set(members) == {"own", "__init__", "far"}


# -- wheels on an index --------------------------------------------------------------------


def test_releases_that_are_supported_are_read_from_an_index_without_fetching_their_wheels(tmp_path):
    wheel = tmp_path / "vllm-1.0.0-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "__version__ = '1.0.0'\n")
        archive.writestr("vllm/ballast.so", bytes(4 << 20))
    sent = []

    class Counted(FileResponse):
        async def __call__(self, scope, receive, send):
            async def count(message):
                sent.append(len(message.get("body", b"")))
                await send(message)

            await super().__call__(scope, receive, count)

    file = {"filename": wheel.name, "url": f"../../files/{wheel.name}", "upload_time": "2030-01-02T03:04:05"}
    versions = {
        "0.9.0": [file],
        "1.0.0": [file],
        "1.1.0rc1": [file],
        "1.2.0": [file | {"filename": "vllm-1.2.0.tar.gz"}],
    }
    app = Starlette(
        routes=[
            Route("/pypi/vllm/json", lambda _: JSONResponse({"releases": versions})),
            Route("/files/{name}", lambda _: Counted(wheel)),
        ]
    )
    with Served(app) as index:
        (found,) = wheels.releases(SpecifierSet(">=1.0"), index.url)
        assert (found.version, found.uploaded) == ("1.0.0", "2030-01-02")
        tree = wheels.tree(found, tmp_path / "cache")
        assert tree.find("vllm", "__version__")
        assert tree.module("vllm.missing") is None
    assert 0 < sum(sent) < 1 << 20
    again = wheels.tree(found, tmp_path / "cache")  # the index is gone
    assert again.find("vllm", "__version__")


# -- what is committed -----------------------------------------------------------------------


def test_the_committed_results_are_of_this_list_and_break_nothing():
    data = json.loads(command.RESULTS.read_text("utf-8"))
    assert data["assumptions"] == len(ASSUMPTIONS), "run python -m tools.vllm_releases"
    assert data["supported"] == str(command.supported())
    assert data["releases"][0]["release"] == "0.23.0"
    assert report.broken(data["releases"]) == []


def test_the_document_shows_the_committed_results():
    text = command.DOCUMENT.read_text("utf-8")
    data = json.loads(command.RESULTS.read_text("utf-8"))
    assert between(text, command.BEGIN, command.END, report.render(data)) == text, "run python -m tools.vllm_releases"
