"""A third party's pipes, as an installed distribution, and a `doctor --serve` that has them, too."""

import os
import subprocess
import sys
import textwrap

import pytest

PIPES = """
    import os
    import time

    import torch

    from kvconnect.pipes.base import Pipe
    from kvconnect.pipes.tcp import TcpPipe


    class Crawl(Pipe):
        name = "crawl"
        a_second = 1e6

        def __init__(self, spec):
            self.inner = TcpPipe.open(spec)

        def send_tensor(self, tensor):
            if tensor is not None:
                time.sleep(tensor.nbytes / self.a_second)
            self.inner.send_tensor(tensor)

        def recv_tensor(self):
            return self.inner.recv_tensor()

        def close(self):
            self.inner.close()


    class Liar(Crawl):
        name = "liar"
        a_second = 1e12

        def send_tensor(self, tensor):
            if tensor is not None and tensor.nbytes >= 4096:
                tensor = tensor.clone()
                tensor.view(torch.uint8).view(-1)[0] ^= 1
            super().send_tensor(tensor)


    class Chatty(Crawl):
        name = "chatty"
        a_second = 1e12

        def __init__(self, spec):
            os.write(1, b"hello from a pipe\\n")
            super().__init__(spec)


    class Bomb(Crawl):
        name = "bomb"

        def __init__(self, spec):
            if spec.side == "asks":
                os._exit(9)
            super().__init__(spec)
"""
NAMES = ("crawl", "liar", "chatty", "bomb")
ENTRIES = "[kvconnect.pipes]\n" + "".join(f"{name} = wild_pipes:{name.title()}\n" for name in NAMES)
#: A small paged case, so that nothing takes long but what is slow.
SMALL = ("--layers", "2", "--piece-bytes", "4096", "--load-bytes", "524288")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    (folder / "wild_pipes.py").write_text(textwrap.dedent(PIPES))
    info = folder / "wild_pipes-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wild-pipes\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    return folder


@pytest.fixture
def wild(site, monkeypatch):
    """Have the pipes registered in this process."""
    monkeypatch.syspath_prepend(str(site))


def command(*arguments):
    return [sys.executable, "-m", "kvconnect", "doctor", *arguments]


def environment(site):
    return os.environ | {"PYTHONPATH": str(site)}


@pytest.fixture(scope="session")
def serving(site):
    """Start a `doctor --serve` in a process of its own; return its address."""
    with subprocess.Popen(
        command("--serve", *SMALL), env=environment(site), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()
