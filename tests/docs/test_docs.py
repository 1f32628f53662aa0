"""The documentation says nothing that is not so: links, commands, configurations, generated parts."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest

from bench.report import ROOT, between
from kvconnect import cli, errors
from kvconnect.config import Config
from tests.docs import pages
from tools.docs import __main__ as generated
from tools.docs import contracts, options

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
LANGUAGES = {"bash", "console", "json", "python", "text", "toml", "yaml", ""}


def of(*languages):
    return pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in languages], ids=str)


# -- links ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in pages.links(page):
        if re.match(r"https?://", link):
            continue  # what is out there is not this repository's to promise
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in pages.anchors(target), f"{page.name}: {link} has no such heading"


def test_a_link_to_a_heading_that_is_missing_would_be_noticed():
    assert "leases-and-deadlines" in pages.anchors(ROOT / "docs" / "reliability.md")
    assert pages.slug("`pipe`: what, and *why*?") == "pipe-what-and-why"


# -- blocks --------------------------------------------------------------------------------


def test_every_block_says_what_it_is():
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


@of("python")
def test_python_is_python(block):
    ast.parse(block.text)


@of("json")
def test_configurations_are_accepted(block):
    transfer = json.loads(block.text)
    Config.parse(transfer["kv_connector_extra_config"])


@of("toml")
def test_entry_points_are_of_groups_that_are_looked_up(block):
    (group,) = tomllib.loads(block.text)["project"]["entry-points"]
    assert group in {"kvconnect.pipes", "kvconnect.buffers", "kvconnect.connectors"}


def commands():
    """Return every command line that a page shows in a block."""
    for block in BLOCKS:
        if block.language in {"bash", "console"}:
            text = block.text.replace("\\\n", " ")
            for line in text.splitlines():
                shown = line.removeprefix("$ ") if block.language == "console" else line
                if block.language == "bash" or line.startswith("$ "):
                    yield pytest.param(shown, id=f"{block}: {shown[:40]}")


def words(line: str) -> list[str]:
    found = shlex.split(line, comments=True)
    return found[: -1 if found[-1:] == ["&"] else None]


@pytest.mark.parametrize("line", list(commands()))
def test_commands_exist_and_take_what_they_are_given(line, capsys):
    match words(line):
        case ["make", target, *_]:
            assert target in targets()
        case [python, "-m", "kvconnect", command, *arguments] if python.endswith("python") and command in cli._OWN:
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main([command, "--help"])
            known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            assert {each for each in arguments if each.startswith("--")} <= known
        case [python, "-m", "kvconnect", command, *arguments] if python.endswith("python"):
            cli._parser().parse_args([command, *arguments])
        case [python, "-m", module, *_] if python.endswith("python") and not module.startswith("vllm"):
            assert importlib.util.find_spec(module), module
        case [python, script, *arguments] if python.endswith("python") and script.startswith("examples/"):
            # Read, not run: what an example imports is not in every environment.
            known = set(re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / script).read_text("utf-8")))
            assert {each for each in arguments if each.startswith("--")} <= known


@of("bash", "console")
def test_transfer_configurations_in_commands_are_accepted(block):
    for text in re.findall(r"--kv-transfer-config '([^']+)'", block.text):
        Config.parse(json.loads(text).get("kv_connector_extra_config", {}))


def test_extras_that_are_to_be_installed_exist():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])
    for path in (*pages.PAGES, *(ROOT / "kvconnect").rglob("*.py")):
        named = set(re.findall(r"kvconnect\[(\w+)\]", path.read_text("utf-8")))
        assert named <= extras, f"{path.name}: {named - extras}"


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def test_modules_and_targets_that_are_named_in_the_text_exist():
    for page in pages.PAGES:
        text = page.read_text("utf-8")
        for target in re.findall(r"`make ([\w-]+)", text):
            assert target in targets(), f"{page.name}: make {target}"
        for module in re.findall(r"python -m ([\w.]+)", text):
            if module.partition(".")[0] != "vllm":
                assert importlib.util.find_spec(module.rstrip(".")), f"{page.name}: python -m {module}"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    places = [ROOT, ROOT / "kvconnect", ROOT / "kvconnect" / "pipes", ROOT / "kvconnect" / "buffers", page.parent]
    shown = {name for block in pages.DOCS for name in pages.modules(block)}
    for path in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|toml|json|txt|lock|cu|sh))`", page.read_text("utf-8")):
        if path not in shown and not path.startswith("build/"):
            assert any((place / path).exists() for place in places), f"{page.name}: {path}"


# -- what is generated ---------------------------------------------------------------------


@pytest.mark.parametrize("page", generated.PAGES, ids=lambda page: page.name)
def test_generated_parts_are_of_this_source(page):
    text = page.read_text("utf-8")
    fresh = between(text, generated.BEGIN, generated.END, generated.PAGES[page]())
    assert fresh == text, "run python -m tools.docs"


def test_every_class_that_reads_options_is_in_the_tables():
    shown = {base.__name__ for cls in options.SECTIONS.values() for base in cls.__mro__}
    for path in (*(ROOT / "kvconnect" / "pipes").glob("*.py"), *(ROOT / "kvconnect" / "buffers").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
                # A table's are arguments of a constructor; those of adopted pipes are told to their adopters.
                assert node.name in shown | {"TableOptions", "LegacyOptions"}, (
                    f"{path.name}: tools/docs/options.py lacks {node.name}"
                )


def test_every_option_is_documented_where_it_is_defined():
    for cls in options.SECTIONS.values():
        documented = dict(options._documented(cls))
        assert list(documented) == list(cls.__dataclass_fields__), cls.__name__
        assert all(documented.values())


def test_every_public_method_of_a_contract_has_a_text():
    assert not re.search(r"^#+ .+\n\n(`[^\n]*\n\n)?(?=#)", contracts.render(), re.MULTILINE)


# -- threads -------------------------------------------------------------------------------


def test_threads_that_are_named_exist_and_those_that_exist_are_named():
    page = (ROOT / "docs" / "threads-and-ownership.md").read_text("utf-8")
    named = set(re.findall(r"`kvconnect-([\w{}-]+)`", page))
    source = "".join(path.read_text("utf-8") for path in (ROOT / "kvconnect").glob("[bc]*/**/*.py"))
    source += "".join(path.read_text("utf-8") for path in (ROOT / "kvconnect" / "pipes").glob("*.py"))
    jobs = re.search(r"jobs = \(([^)]+)\)", source)
    assert jobs
    written = set(re.findall(r'(?:Turns|Crew|Loop|Reactor|Lanes?|server|client)\([^"]*?f?"kvconnect-([^"]+)"', source))
    written |= set(re.findall(r'name=f?"kvconnect-([^"]+)"', source)) | set(re.findall(r'"([\w-]+)"', jobs[1]))
    written |= {"cuda{device}-lane{number}", "nixl"}  # names that are passed on
    assert named == written - {"{job}"}


# -- errors --------------------------------------------------------------------------------


def test_every_error_has_its_heading_and_every_heading_its_error():
    raised = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    page = ROOT / "docs" / "errors.md"
    headings = set(re.findall(r"^## (\w+)$", page.read_text("utf-8"), re.MULTILINE))
    assert headings == raised


def test_every_error_says_what_is_afterwards():
    for section in re.split(r"^## ", (ROOT / "docs" / "errors.md").read_text("utf-8"), flags=re.MULTILINE)[2:]:
        assert "- **Afterwards:**" in section, section[:40]


# -- the whole -----------------------------------------------------------------------------


def build(root, site):
    """Build the pages as `make docs` does; return the exit status and what was printed."""
    # Not --quiet: warnings that are not printed are not counted either.
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_pages_are_built_without_a_warning(tmp_path):
    status, said = build(ROOT, tmp_path)
    assert status == 0, said
    assert {f"{page.stem}.html" for page in pages.DOCS} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("link", ["nowhere.md", "errors.md#nothing"])
def test_pages_with_a_dead_link_are_not_built(tmp_path, link):
    (tmp_path / "docs").mkdir()
    for name in ("mkdocs.yml", "tools/docs/hooks.py", "docs/errors.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    config = tmp_path / "mkdocs.yml"
    config.write_text(config.read_text("utf-8").partition("nav:")[0], "utf-8")
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n[there]({link})\n", "utf-8")
    status, said = build(tmp_path, tmp_path / "site")
    assert status != 0
    assert f"'{link}'" in said
