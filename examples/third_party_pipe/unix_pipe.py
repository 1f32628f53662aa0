"""A kvconnect pipe over Unix domain sockets: three methods, and how its two ends meet and fail."""

import contextlib
import socket
import tempfile
from collections.abc import Iterator

from torch import Tensor

from kvconnect import Pipe, PipeSpec, Traits, errors
from kvconnect.pipes import wire
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.base import Reach


class UnixPipe(Pipe):
    name, traits = "unix", Traits(reach=Reach.HOST)
    _over: errors.KVConnectError | None = None

    def __init__(self, spec: PipeSpec) -> None:
        self._sending, self._receiving = Alone("send"), Alone("receive")
        self._socket = socket.socket(socket.AF_UNIX)
        with tempfile.TemporaryDirectory() as folder, self._moving():  # a folder for this user only
            self._socket.settimeout(spec.timeout_s)
            if spec.side == "serves":
                self._socket.connect(str(spec.exchange({}).get("path")))  # or there is nobody
            else:
                with self._socket as listener:
                    listener.bind(f"{folder}/pipe")
                    listener.listen(1)
                    spec.exchange({"path": f"{folder}/pipe"})
                    self._socket = listener.accept()[0]
                self._socket.settimeout(spec.timeout_s)

    def send_tensor(self, tensor: Tensor | None) -> None:
        header, dense = wire.encode(tensor)  # refuses what cannot be carried
        with self._sending, self._moving():
            self._socket.sendall(header)
            self._socket.sendall(b"" if dense is None else wire.memory(dense))

    def recv_tensor(self) -> Tensor | None:
        with self._receiving, self._moving():
            try:
                self._socket.recv(1, socket.MSG_PEEK)
            except TimeoutError:  # between two messages: no harm
                raise errors.DeadlineError("no message came") from None
            return wire.receive(self._socket.recv_into)

    def close(self) -> None:
        with contextlib.suppress(errors.KVConnectError), self._sending, self._moving():
            self._socket.sendall(wire.control(wire.Kind.END))
        self.abort()

    def abort(self) -> None:
        self._end(errors.ClosedError("this end was closed"))

    def _end(self, error: errors.KVConnectError) -> None:
        self._over = error
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever is blocked
        self._socket.close()

    @contextlib.contextmanager
    def _moving(self) -> Iterator[None]:
        if self._over is not None:
            raise self._over
        try:
            yield
        except (OSError, errors.BrokenError, errors.EndOfPipe) as error:
            if self._over is None:
                late = isinstance(error, TimeoutError)
                self._end(errors.DeadlineError("the other end stalls") if late else errors.as_ours(error))
        if self._over is not None:
            raise self._over
