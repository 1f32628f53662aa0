"""The suite on CUDA: a pipe that obeys every law, and for each law about streams one that only it catches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from kvconnect.errors import KVConnectError
from kvconnect.testing import stream_laws
from kvconnect.testing.devices import complete
from kvconnect.testing.ends import End, LocalEnd
from kvconnect.testing.layouts import clone, differences, noisy_memory, shared_region
from kvconnect.testing.peers import open_pair
from kvconnect.testing.pipe_tests import CudaPipeTests
from kvconnect.testing.processes import seen_there
from tests.gpu import pipes

pytestmark = pytest.mark.gpu

Law = Callable[[End], None]


class TestCudaPipe(CudaPipeTests):
    pipe_class = pipes.CudaPipe


CAUGHT: list[tuple[type[pipes.CudaPipe], Law]] = [
    (pipes.SendsAtOnce, stream_laws.what_is_sent_is_what_the_callers_stream_will_have_written),
    (pipes.SendsLater, stream_laws.what_is_written_after_a_send_is_not_sent),
    (pipes.HandsOutTooEarly, stream_laws.what_was_received_can_be_read_at_once),
    (pipes.ReceivesOverWhatIsRead, stream_laws.memory_is_not_received_into_before_its_stream_is_done_with_it),
    (pipes.StopsTheDevice, stream_laws.messages_do_not_wait_for_other_streams),
    (pipes.StopsTheDeviceForBlocks, stream_laws.transfers_do_not_wait_for_other_streams),
    (pipes.SaysDoneTooEarly, stream_laws.a_transfer_that_is_done_can_be_read_on_any_stream),
    (pipes.BorrowsABlock, stream_laws.an_engine_can_compute_in_other_blocks_meanwhile),
]


@pytest.mark.parametrize(("broken", "law"), [pytest.param(*case, id=case[0].__name__) for case in CAUGHT])
def test_only_its_own_law_catches_a_broken_pipe(
    broken: type[pipes.CudaPipe], law: Law, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Held up for as long as these small pipes need to go wrong.
    monkeypatch.setattr(stream_laws, "SLOW_CYCLES", 100_000_000)
    monkeypatch.setattr(stream_laws, "LONG_CYCLES", 800_000_000)
    monkeypatch.setattr(stream_laws, "SETTLE_S", 0.05)
    monkeypatch.setattr(stream_laws, "REPEATS", 40)
    assert [each.__name__ for each in stream_laws.LAWS if catches(each, broken)] == [law.__name__]


def catches(law: Law, broken: type[pipes.CudaPipe]) -> bool:
    """Try a law once: it fails by its own assertion, by the pipe's error or by a wait that ran out."""
    pair = open_pair(broken, device="cuda:0")
    try:
        law(LocalEnd(pair))
    except (AssertionError, KVConnectError, TimeoutError):
        return True
    finally:
        pair.close()
        complete("cuda:0")
    return False


def test_every_law_has_a_pipe_that_it_catches() -> None:
    assert [law for _, law in CAUGHT] == list(stream_laws.LAWS)


def test_the_peer_process_has_the_same_device_by_another_number(devices: tuple[str, str]) -> None:
    for device in devices:
        there, environ = seen_there(device, renumber=True)
        code = f"import torch; print(torch.cuda.get_device_properties({there!r}).uuid)"
        found = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert found.stdout.strip() == str(torch.cuda.get_device_properties(device).uuid)


def test_memories_of_one_seed_are_alike_on_every_device(devices: tuple[str, str]) -> None:
    layout = shared_region(3, 40, 2, 1 << 18)
    here = noisy_memory(layout, 5)
    for device in devices:
        there = noisy_memory(layout, 5, device)
        assert differences(there, here) == []
        assert differences(clone(there), here) == []
        assert differences(noisy_memory(layout, 6, device), here) != []
