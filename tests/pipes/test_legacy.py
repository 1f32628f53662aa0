"""A class of vLLM's former shape, which knows nothing of kvconnect, keeps the core laws and carries hand-overs."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import pytest

from kvconnect import registry
from kvconnect.errors import BrokenError, HandshakeError
from kvconnect.pipes import wire
from kvconnect.pipes.base import PipeSpec, Reach, Traits
from kvconnect.pipes.legacy import adopt
from kvconnect.testing import block_laws, pipe_laws
from kvconnect.testing.peers import LIMIT_S, open_pair


class OldPipe:
    """As `KVPipeBase` was implemented: rank 0 listens where the configuration says, rank 1 tries until it answers."""

    def __init__(self, local_rank, config, device=None, port_offset=0):
        assert (local_rank, config.kv_parallel_size, config.kv_buffer_device, device) == (0, 2, "cpu", "cpu")
        at = (config.kv_ip, config.kv_port + port_offset)
        if config.kv_rank == 0:
            with socket.create_server(at) as listener:
                listener.settimeout(LIMIT_S)
                self.socket, _ = listener.accept()
            return
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError):
                self.socket = socket.create_connection(at, LIMIT_S)
                return
            time.sleep(0.01)
        raise ConnectionRefusedError(f"nobody listens at {at}")

    def send_tensor(self, tensor):
        header, dense = wire.encode(tensor)
        self.socket.sendall(header)
        self.socket.sendall(b"" if dense is None else wire.memory(dense))

    def recv_tensor(self):
        return wire.receive(self.socket.recv_into)

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


Adopted = adopt(OldPipe, "old", Traits(reach=Reach.HOST))


@pytest.mark.parametrize("law", [*pipe_laws.CORE, *block_laws.LAWS], ids=lambda law: law.__name__)
def test_it_keeps_the_core_laws_and_those_of_blocks(law):
    pair = open_pair(Adopted)
    try:
        law(pair)
    finally:
        pair.close()


def test_what_it_raises_is_ours_with_its_cause():
    def fails(*_, **__):
        raise RuntimeError("no such device")

    pair = open_pair(adopt(fails, "fails", Traits(reach=Reach.HOST)))
    with pytest.raises(BrokenError, match="no such device") as caught:
        pair.here.recv_tensor()
    assert isinstance(caught.value.__cause__, RuntimeError)
    pair.close()


def test_an_end_that_names_no_address_is_refused():
    with pytest.raises(HandshakeError, match="a host and a port"):
        Adopted.open(PipeSpec("asks", lambda _: {"port": "high"}))


def test_it_carries_a_hand_over_between_two_of_vllms_schedulers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("vllm", reason="the engines are vLLM's schedulers")
    from kvconnect import _plugin
    from kvconnect.testing import connector_laws, engine

    _plugin.register()
    real = registry.pipe
    monkeypatch.setattr(registry, "pipe", lambda name: Adopted if name == "old" else real(name))
    extra = {"pipe": "old", "group": "test-legacy", "lease_s": 2.0}
    engines = connector_laws.Deployment.open(engine.describe_model(tmp_path), "KvConnect", extra)
    try:
        connector_laws.several_loads_run_at_once(engines)
    finally:
        engines.close()
