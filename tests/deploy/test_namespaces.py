"""Two pods as two hosts in namespaces: what the page has the doctor do, as the manifests have it."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import ROOT
from tests.deploy import pods
from tests.docs import pages
from tests.hosts import two_hosts
from tools.manifests.__main__ import render

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # each doctor loads torch


def commands():
    """Return what the page has each pod's shell do."""
    for block in pages.blocks(ROOT / "docs" / "kubernetes.md"):
        for component, script in re.findall(r"kubectl exec deploy/pd-(\w+) -- (sh -c .*)", block.text):
            yield component, shlex.split(script)


def test_the_doctor_of_one_pod_measures_the_way_to_the_other(tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o440)
    templates = pods.pods(pods.load(render({"connector": "KvConnectTcp"}, "pd")))
    scripts = dict(commands())
    with contextlib.ExitStack() as stack:
        said = ""
        for component, host in zip(("prefill", "decode"), stack.enter_context(two_hosts(tmp_path)), strict=True):
            (container,) = templates[f"pd-{component}"]["spec"]["containers"]
            transfer = pods.environment(container, host.address)["KV_TRANSFER_CONFIG"]
            path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
            variables = {"KV_TRANSFER_CONFIG": transfer.replace(pods.KEY_PATH, str(key)), "PATH": path}
            *shell, script = scripts[component]
            script = re.sub(r"10\.[\d.]+:\d+", said, script.replace("cuda:0", "cpu"))
            command = host.command(*shell, f"exec {script}")
            started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables)
            stack.enter_context(started)
            stack.callback(started.terminate)
            assert started.stdout is not None
            said = started.stdout.readline().split()[-1] if component == "prefill" else started.stdout.read()
    assert re.search(r"^ok +path +tcp is taken: ", said, re.MULTILINE), said
    assert "ok    config" in said
