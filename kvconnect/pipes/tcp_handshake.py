"""How a connection of the TCP pipe becomes TLS, before any message is sent over it.

::

    asks → serves   greeting and one-time token (in the clear, as without TLS)
    both            TLS 1.3 handshake, a certificate from each
    asks → serves   the secret of the pipe, which came over the control channel
    serves → asks   a welcome

Without a token nobody can make this process compute a handshake. A token may be seen on the
way, so the secret says again, where nobody sees it, that this is the end that was met over
the control channel, and not another owner of a certificate. The welcome is why the asking end knows that its
certificate was accepted before it sends anything: in TLS 1.3 its side of the handshake is over earlier.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from kvconnect.errors import BrokenError, ClosedError, DeadlineError, HandshakeError, KVConnectError
from kvconnect.pipes import reactor
from kvconnect.pipes.reactor import Reactor, Timer
from kvconnect.pipes.tcp_farewell import Farewell, hang_up
from kvconnect.pipes.tcp_io import Io
from kvconnect.pipes.tcp_tls import TlsIo

#: What becomes of a connection: how its bytes go from here on, or why there is none.
Met = Io | KVConnectError
#: Told so, with the socket; if there is an error, the socket is not the caller's any more.
Joined = Callable[[socket.socket, Met], None]

SECRET_BYTES: Final = 16
_WELCOME: Final = b"kvctls1\n"
#: How long a refused peer may take to fetch the alert that says why.
_FAREWELL_S: Final = 2.0


class Handshake:
    """One handshake; runs on the reactor's thread. The socket is its own meanwhile."""

    def __init__(
        self,
        loop: Reactor,
        context: ssl.SSLContext,
        secret: bytes,
        timeout_s: float,
        sock: socket.socket,
        hello: bytes = b"",
    ) -> None:
        """Begin, soon, on a connected or connecting socket. From any thread.

        Args:
            loop: what serves the socket meanwhile.
            context: of the side of TLS that this end is.
            secret: shown to the peer, or asked of it.
            timeout_s: for all of it.
            sock: becomes non-blocking; is closed if this fails.
            hello: sent ahead, in the clear.

        """
        sock.setblocking(False)
        self._loop, self._sock, self._timeout_s = loop, sock, timeout_s
        self._io = TlsIo(context, hello)
        tls = self._io.tls
        asks = context.protocol is ssl.PROTOCOL_TLS_CLIENT
        words: list[Callable[[], object]] = (
            [lambda: tls.write(secret), lambda: self._hear(_WELCOME, "answered something else than a welcome")]
            if asks
            else [lambda: self._hear(secret, "does not know this pipe's secret"), lambda: tls.write(_WELCOME)]
        )
        self._steps: deque[Callable[[], object]] = deque([tls.do_handshake, *words])
        self._timer: Timer | None = None
        self._over: Future[TlsIo] = Future()
        loop.call_soon(self._begin)

    def wait(self) -> TlsIo:
        """Block until it is over; not on the reactor's thread.

        Raises:
            HandshakeError: one end refuses the other; says which and why.
            BrokenError, DeadlineError: the connection was lost, or the peer too slow.

        """
        try:
            return self._over.result(self._timeout_s)
        except TimeoutError:
            self._loop.call_soon(self._abandon)
            raise self._late() from None

    def then(self, joined: Joined) -> None:
        """Tell ``joined`` once it is over, on the reactor's thread."""

        def tell(over: Future[TlsIo]) -> None:
            error = over.exception()
            joined(self._sock, error if isinstance(error, KVConnectError) else over.result())

        self._over.add_done_callback(tell)

    def cancel(self) -> None:
        """Close the connection, unless this is over. From any thread."""
        self._loop.call_soon(lambda: self._give_up(ClosedError("this end was closed")))

    def _abandon(self) -> None:
        self._give_up(self._late())
        if self._over.exception() is None:
            hang_up(self._sock)  # it was secured after all, but nobody waits for it any more

    def _begin(self) -> None:
        self._timer = self._loop.call_later(self._timeout_s, lambda: self._give_up(self._late()))
        try:
            self._loop.watch(self._sock.fileno(), reactor.READ | reactor.WRITE | reactor.EDGE, self._ready)
        except OSError as error:
            self._give_up(BrokenError(f"the connection failed: {error}"), error)

    def _ready(self, _events: int) -> None:
        try:
            self._advance()
        except BlockingIOError:
            return  # there will be an edge
        except ssl.SSLError as error:
            self._refuse(_refusal(error), error)
        except HandshakeError as error:
            self._refuse(error)
        except OSError as error:
            self._give_up(BrokenError(f"the connection failed before it was secured: {error}"), error)
        else:
            self._end()
            self._over.set_result(self._io)

    def _advance(self) -> None:
        """Go as far as what has come allows; `BlockingIOError` if more has to come."""
        fd = self._sock.fileno()
        while self._steps:
            try:
                self._steps[0]()
            except ssl.SSLWantReadError:
                self._flush(fd)
                if not self._io.fetch(fd):
                    raise ConnectionResetError("the peer closed it") from None
            else:
                self._steps.popleft()
        self._flush(fd)

    def _flush(self, fd: int) -> None:
        while not self._io.flushed:
            self._io.flush(fd)

    def _hear(self, words: bytes, wrong: str) -> None:
        if not secrets.compare_digest(self._io.tls.read(len(words)), words):
            raise HandshakeError(f"the peer's certificate is good, but it {wrong}")

    def _refuse(self, error: HandshakeError, cause: BaseException | None = None) -> None:
        """End; the peer has to hear why."""
        self._end()
        with contextlib.suppress(OSError):  # it may have gone, or take nothing
            self._flush(self._sock.fileno())
            self._sock.shutdown(socket.SHUT_WR)
        Farewell(self._loop, self._sock, _FAREWELL_S)
        error.__cause__ = cause
        self._over.set_exception(error)

    def _give_up(self, error: KVConnectError, cause: BaseException | None = None) -> None:
        if not self._over.done():
            self._end()
            hang_up(self._sock)
            error.__cause__ = cause
            self._over.set_exception(error)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._loop.unwatch(self._sock.fileno())

    def _late(self) -> DeadlineError:
        return DeadlineError(f"the connection was not secured by TLS within {self._timeout_s} s")


def _refusal(error: ssl.SSLError) -> HandshakeError:
    """Say which end refuses which, as OpenSSL tells it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return HandshakeError(
            f"the peer's certificate is refused: {error.verify_message}; "
            "it must be signed by an authority of our pipe.tls.ca and be valid today"
        )
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if "alert" in reason:
        return HandshakeError(
            f"the peer refuses our certificate, or that we have none: {reason}; pipe.tls.cert must be signed by an "
            "authority of the peer's pipe.tls.ca and be valid today"
        )
    return HandshakeError(f"no TLS 1.3 with the peer (pipe.tls): {reason}")
