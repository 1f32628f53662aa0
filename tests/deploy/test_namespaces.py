"""Two pods as two network namespaces, joined by one wire: what the page has the doctor do, as the manifests have it."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report import ROOT
from tests.deploy import pods
from tests.docs import pages
from tools.manifests.__main__ import render

IP = shutil.which("ip") or ""
pytestmark = [
    pytest.mark.slow,  # each doctor loads torch
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.getuid() != 0 or not IP, reason="making network namespaces takes root and iproute2"),
]
ADDRESSES = {"prefill": "10.77.0.2", "decode": "10.77.0.3"}


def commands():
    """Return what the page has each pod's shell do."""
    for block in pages.blocks(ROOT / "docs" / "kubernetes.md"):
        for component, script in re.findall(r"kubectl exec deploy/pd-(\w+) -- (sh -c .*)", block.text):
            yield component, shlex.split(script)


@pytest.fixture
def namespaces():
    names = {component: f"kvc{os.getpid()}{component[0]}" for component in ADDRESSES}
    prefill, decode = names.values()
    try:
        for name in names.values():
            subprocess.run([IP, "netns", "add", name], check=True)
        join = [IP, "link", "add", "veth0", "netns", prefill, "type", "veth", "peer", "name", "veth0", "netns", decode]
        subprocess.run(join, check=True)
        for component, name in names.items():
            for what in (["addr", "add", f"{ADDRESSES[component]}/24", "dev", "veth0"], ["link", "set", "veth0", "up"]):
                subprocess.run([IP, "-n", name, *what], check=True)
        yield names
    finally:
        for name in names.values():
            subprocess.run([IP, "netns", "del", name], check=False)


def test_the_doctor_of_one_pod_measures_the_way_to_the_other(namespaces, tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o440)
    templates = pods.pods(pods.load(render({"connector": "KvConnectTcp"}, "pd")))
    scripts = dict(commands())
    with contextlib.ExitStack() as stack:
        said = ""
        for component in ("prefill", "decode"):
            (container,) = templates[f"pd-{component}"]["spec"]["containers"]
            transfer = pods.environment(container, ADDRESSES[component])["KV_TRANSFER_CONFIG"]
            path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
            variables = {"KV_TRANSFER_CONFIG": transfer.replace(pods.KEY_PATH, str(key)), "PATH": path}
            *shell, script = scripts[component]
            script = re.sub(r"10\.[\d.]+:\d+", said, script.replace("cuda:0", "cpu"))
            command = [IP, "netns", "exec", namespaces[component], *shell, f"exec {script}"]
            started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables)
            stack.enter_context(started)
            stack.callback(started.terminate)
            assert started.stdout is not None
            said = started.stdout.readline().split()[-1] if component == "prefill" else started.stdout.read()
    assert re.search(r"^ok +path +tcp is taken: ", said, re.MULTILINE), said
    assert "ok    config" in said
