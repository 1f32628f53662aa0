"""The commands for clusters that the pages show: what needs no cluster is run, what does is rendered and validated."""

from __future__ import annotations

import re
import shlex
import subprocess

import helm_python
import pytest
import yaml

from bench.report import ROOT
from kvconnect import registry
from kvconnect.doctor import peer
from kvconnect.doctor.main import _order, _parser
from kvconnect.keys import Keys
from tests.deploy import pods, test_dockerfile
from tests.docs import pages
from tools.manifests.__main__ import CHART, render

PAGES = [ROOT / "README.md", ROOT / "docs" / "kubernetes.md"]
TOOLS = ("docker", "helm", "kubectl")


def shown():
    """Return every command line of these tools that a page shows."""
    for page in PAGES:
        for block in pages.blocks(page):
            if block.language == "bash":
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.split(" ")[0] in TOOLS:
                        yield pytest.param(line, id=f"{block}: {line[:40]}")


def options(words):
    """Return the arguments that stand alone, and the values of each option."""
    plain, found, rest = [], {}, iter(words)
    for word in rest:
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            plain.append(word)
        else:
            found.setdefault(name, []).append(value if equals else next(rest))
    return plain, found


def values_of(given):
    """Return a chart's values as `--set` makes them."""
    return helm_python.parse_set_string(",".join(given.get("--set", [])))


def release():
    return pods.load(render({}, "pd"))


@pytest.mark.parametrize("line", list(shown()))
def test_a_command_does_what_the_page_says(line, tmp_path):
    tool, *words = shlex.split(line.removesuffix("&"), comments=True)
    plain, given = options(words)
    match tool:
        case "docker":
            check_docker(plain, given)
        case "helm":
            check_helm(plain, given)
        case "kubectl":
            check_kubectl(plain, given, line, tmp_path / "key")


def check_docker(plain, given):
    match plain:
        case ["build", "."]:
            assert given["-f"] == [str(test_dockerfile.FILE.relative_to(ROOT))]
            assert given["--target"][0] in test_dockerfile.STAGES
            arguments = {arg for stage in test_dockerfile.STAGES for arg in test_dockerfile.of(stage, "ARG")}
            declared = {argument.partition("=")[0] for argument in arguments}
            assert {text.partition("=")[0] for text in given.get("--build-arg", [])} <= declared
        case _:
            assert plain[0] == "push"


def check_helm(plain, given):
    match plain:
        case ["install", _, "vllm/vllm-stack"]:
            assert given["-f"] == ["deploy/production-stack/values.yaml"], "which test_others.py looks into"
        case ["install", name, chart]:
            assert ROOT / chart == CHART
            pods.check(pods.load(render(values_of(given), name)))
        case _:
            assert plain[:3] == ["repo", "add", "vllm"]


def check_kubectl(plain, given, line, key):
    templates = pods.pods(release())
    match plain:
        case ["create", "secret", "generic", name]:
            (literal,) = given["--from-literal"]
            item, _, secret = literal.partition("=")
            # The shell's part is run, and what it makes is a key.
            subprocess.run(["/bin/bash", "-c", f"umask 077; printf %s {secret} > {key}"], timeout=20, check=True)
            Keys.from_shared(str(key), "key_file")
            assert yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))["key"] == {"secret": name, "item": item}
        case ["apply"]:
            (path,) = given["-f"]
            documents = pods.load((ROOT / path).read_text("utf-8"))
            pods.check([found for found in documents if "kserve" not in found["apiVersion"]])
        case ["get", "pods"]:
            (selector,) = given["-l"]
            labels = dict(pair.split("=") for pair in selector.split(","))
            assert all(pods.matches(labels, template["metadata"]["labels"]) for template in templates.values())
        case ["port-forward", target, number]:
            service = pods.of_kind(release(), "Service")[target.removeprefix("svc/")]
            assert int(number) in {row["port"] for row in service["spec"]["ports"]}
        case ["exec", target]:
            template = templates[target.removeprefix("deploy/")]
            check_doctor(template["spec"]["containers"][0], shlex.split(line.partition(" -- ")[2]))
        case _:
            pytest.fail(f"nobody has tried this: {line}")


def check_doctor(container, words):
    """Run the line's shell on the container's environment, and have the doctor read what it is given."""
    variables = pods.environment(container, "10.1.2.3")
    assert words[:2] == ["sh", "-c"]
    script = re.sub(r"python3 -m kvconnect doctor", "printf '%s\\\\n'", words[2])
    assert script != words[2]
    said = subprocess.run(
        ["/bin/sh", "-c", script], env=variables, capture_output=True, text=True, timeout=20, check=True
    )
    _order(_parser().parse_args(said.stdout.splitlines()))


@pytest.mark.parametrize("block", [b for b in pages.blocks(PAGES[1]) if b.language == "yaml"], ids=str)
def test_values_that_the_page_shows_are_rendered(block):
    pods.check(pods.load(render(yaml.safe_load(block.text), "pd")))


def test_every_pipe_has_its_row_and_what_the_doctor_says_is_what_it_says():
    rows = [line.split("|") for line in PAGES[1].read_text("utf-8").splitlines() if line.startswith("| `")]
    pipes = {row[1].strip(" `") for row in rows}
    assert pipes == registry.pipes().keys() - {"inproc"}
    said = "".join(path.read_text("utf-8") for path in (ROOT / "kvconnect" / "doctor").glob("*.py"))
    findings = set(re.findall(r'"((?:host|peer|path)[\w.]*)"', said))
    findings |= {f"pipe.{name}" for name in pipes} | {f"peer.{name}" for name in peer._NAMESPACES}
    for row in rows:
        assert set(re.findall(r"`([\w.]+)`", row[-2])) <= findings


def test_the_pages_show_commands():
    assert {parameter.values[0].split(" ")[0] for parameter in shown()} >= {"docker", "helm", "kubectl"}
