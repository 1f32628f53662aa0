"""The tensor path of an NCCL pipe: by way of host memory, over the host pipes beside it.

A send over NCCL occupies multiprocessors until the other end receives, and whether it
will is not known for tensors: blocks are ordered by the end that receives, tensors by
the one that sends. So tensors, which the block path does not need, take the
host pipes, and with them their order, ends and deadlines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from kvconnect.errors import BrokenError, ClosedError, IntegrityError, KVConnectError, TensorRejectedError
from kvconnect.pipes import wire
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.companion import Companion

T = TypeVar("T")


class HostTensors:
    """`Pipe`'s tensor path for one end; its methods are the contract's.

    Args:
        companion: the end's host pipes; theirs to close from now on.
        device: where this end's tensors are, ``"cuda:0"`` say.

    """

    def __init__(self, companion: Companion, device: str) -> None:
        self._companion, self._device = companion, torch.device(device)
        self._sending, self._receiving = Alone("send"), Alone("receive")
        self._closed = False
        self._failure: KVConnectError | None = None

    def send(self, tensor: Tensor | None) -> None:
        """As `Pipe.send_tensor`. The copy to the host waits for the caller's current stream."""
        self._check_usable()
        with self._sending:
            self._send(tensor)

    def receive(self) -> Tensor | None:
        """As `Pipe.recv_tensor`."""
        self._check_usable()
        with self._receiving:
            return self._receive(self._companion.into.recv_tensor)

    def receive_into(self, out: Tensor) -> None:
        """As `Pipe.recv_tensor_into`."""
        got = self.receive()
        if got is None or got.shape != out.shape or got.dtype != out.dtype:
            what = "None" if got is None else f"{tuple(got.shape)} {got.dtype}"
            raise TensorRejectedError(f"received {what}, expected {tuple(out.shape)} {out.dtype}")
        with torch.no_grad():
            out.copy_(got)

    def close(self) -> None:
        """As `Pipe.close`."""
        self._closed = True
        self._companion.into.close()
        self._companion.out.close()

    def abort(self) -> None:
        """As `Pipe.abort`."""
        self._closed = True
        self._companion.abort()

    def _send(self, tensor: Tensor | None) -> None:
        if tensor is None:
            self._guard(lambda: self._companion.out.send_tensor(None))
            return
        _, dense = wire.encode(tensor, (self._device.type,))
        if dense is not None:
            at_host = self._guard(dense.cpu)
            self._guard(lambda: self._companion.out.send_tensor(at_host))

    def _receive(self, receive: Callable[[], Tensor | None]) -> Tensor | None:
        got = self._guard(receive)
        return None if got is None else self._guard(lambda: got.to(self._device))

    def _guard(self, work: Callable[[], T]) -> T:
        """Do ``work``; what breaks one host pipe ends both."""
        try:
            return work()
        except (BrokenError, IntegrityError) as error:
            self._fail(error)
        except RuntimeError as error:  # torch's, for memory or a device that failed
            broken = BrokenError(f"a tensor could not be brought to or from the device: {error}")
            broken.__cause__ = error
            self._fail(broken)

    def _fail(self, error: KVConnectError) -> NoReturn:
        if self._closed:
            raise ClosedError("this end was closed") from error
        earlier, self._failure = self._failure, self._failure or error
        self._companion.abort()
        if earlier is not None:
            raise BrokenError(str(earlier)) from earlier
        raise error

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("this end was closed")
        if self._failure is not None:
            raise BrokenError(str(self._failure)) from self._failure
