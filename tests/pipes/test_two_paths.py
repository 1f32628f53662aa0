"""The pipe around a tensor path and a block path, with paths that only note what is asked of them."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from kvconnect.errors import BusyError, ClosedError, HandshakeError
from kvconnect.pipes.two_paths import BlockPath, TwoPathPipe


class NotingPipe(TwoPathPipe):
    name = "noting"

    def __init__(self) -> None:
        super().__init__(Mock(spec=["send", "receive", "receive_into", "close", "abort"]), 3.0)
        self.blocks = Mock(spec=BlockPath)
        self.let_go_of = 0

    def make_blocks(self, local, remote, channel):
        if local is None:
            raise HandshakeError("no memory")
        return self.blocks

    def let_go(self):
        self.let_go_of += 1


def test_blocks_can_be_moved_between_attach_and_the_end_only() -> None:
    pipe = NotingPipe()
    with pytest.raises(ClosedError, match="attach"):
        pipe.read_blocks([[1]], [[2]])
    pipe.attach(object(), object(), object())
    assert pipe.read_blocks([[1]], [[2]]) is pipe.blocks.read.return_value
    assert pipe.write_blocks([[3]], [[4]]) is pipe.blocks.write.return_value
    pipe.blocks.read.assert_called_once_with([[1]], [[2]])
    pipe.blocks.write.assert_called_once_with([[3]], [[4]])
    with pytest.raises(BusyError):
        pipe.attach(object(), object(), object())
    pipe.close()
    for call in (pipe.read_blocks, pipe.write_blocks):
        with pytest.raises(ClosedError, match="this end was closed"):
            call([[1]], [[2]])
    with pytest.raises(ClosedError):
        pipe.attach(object(), object(), object())


def test_close_may_wait_for_the_blocks_and_abort_does_not() -> None:
    closed, aborted = NotingPipe(), NotingPipe()
    for pipe in closed, aborted:
        pipe.attach(object(), object(), object())
    closed.close()
    aborted.abort()
    closed.blocks.close.assert_called_once()
    closed.blocks.end.assert_not_called()
    closed._tensors.close.assert_called_once_with()
    aborted.blocks.end.assert_called_once()
    aborted.blocks.close.assert_not_called()
    aborted._tensors.abort.assert_called_once_with()


def test_an_end_without_blocks_lets_go_of_what_they_would_have_had() -> None:
    pipe, attached = NotingPipe(), NotingPipe()
    with pytest.raises(HandshakeError):
        pipe.attach(None, object(), object())
    pipe.abort()
    attached.attach(object(), object(), object())
    attached.abort()
    assert (pipe.let_go_of, attached.let_go_of) == (1, 0)


def test_tensors_take_their_own_path() -> None:
    pipe = NotingPipe()
    pipe.send_tensor(None)
    pipe._tensors.send.assert_called_once_with(None)
    assert pipe.recv_tensor() is pipe._tensors.receive.return_value
    pipe.recv_tensor_into("out")
    pipe._tensors.receive_into.assert_called_once_with("out")
    assert pipe.timeout_s == 3.0
