"""What lies between two engines: forwarders that lose, repeat, delay, reorder, cut, stall and damage.

An engine listens at 127.0.0.1 and tells peers another loopback address; a wire listens there,
at the same port. `DataWire` counts bytes; `ControlWire` knows where a ZeroMQ message begins
and which request it is, so that a fault can name what it meets.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgpack

_RESET = struct.pack("ii", 1, 0)
_GREETING = 64  # bytes of ZMTP 3's greeting
_MORE, _LONG, _COMMAND = 1, 2, 4
_CHUNK = 1 << 14

Deliver = Callable[[bytes], None]


class _Message(bytes):
    """A frame that is a message of ours."""


class Wire:
    """Forwards every connection to ``there`` from the same port of the address ``here``."""

    def __init__(self, here: str, there: str, port: int) -> None:
        self._there, self._closed = (there, port), False
        #: Grows with whatever passes, so that a test can tell whether anything does.
        self.passed = 0
        self._lock = threading.Lock()
        self._lines: set[_Line] = set()
        self._flows = threading.Event()
        self._flows.set()
        self._listener = socket.create_server((here, port), backlog=64)
        threading.Thread(target=self._accept, name="test-wire", daemon=True).start()

    def cut(self) -> None:
        """Reset every connection; new ones are let through."""
        with self._lock:
            lines = list(self._lines)
        for line in lines:
            line.reset()

    def stall(self) -> None:
        """Let nothing through in either direction, and close nothing."""
        self._flows.clear()

    def heal(self) -> None:
        """Let through what was stalled, and forget every fault."""
        self._flows.set()

    def close(self) -> None:
        """End the wire and its threads."""
        self._closed = True
        self._flows.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._there, timeout=2)
            except OSError:
                _reset(near)
                continue
            far.settimeout(None)
            for sock in (near, far):  # else a message waits for the acknowledgement of the one before
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = _Line(near, far)
            with self._lock:
                self._lines.add(line)
            for source, target, asks in ((near, far, True), (far, near, False)):
                threading.Thread(
                    target=self._pump, args=(line, source, target, asks), name="test-wire", daemon=True
                ).start()

    def _pump(self, line: _Line, source: socket.socket, target: socket.socket, asks: bool) -> None:
        try:
            for part in self._parts(line, source, asks):
                self.passed += 1
                self._flows.wait()
                self._pass(line, target, part, asks)
            self._flows.wait()
            target.shutdown(socket.SHUT_WR)
            line.over(asks)
        except OSError:
            line.reset()
        if line.ended:
            with self._lock:
                self._lines.discard(line)

    def _parts(self, line: _Line, source: socket.socket, asks: bool) -> Iterator[bytes]:
        while part := source.recv(_CHUNK):
            yield part

    def _pass(self, line: _Line, target: socket.socket, part: bytes, asks: bool) -> None:
        line.send(target, part)


class DataWire(Wire):
    """A wire for bytes; faults count, and hold, what one end sends."""

    def __init__(self, here: str, there: str, port: int) -> None:
        #: Bytes until the fault, what it is, and whether it meets the asking end's bytes.
        self._left, self._fault, self._asks = 0, "", False
        self.struck = threading.Event()
        self._gate = threading.Event()
        self._gate.set()
        super().__init__(here, there, port)

    def after(self, nbytes: int, fault: str, *, asks: bool = False) -> None:
        """``"cut"``, ``"hold"`` (until `let_go`) or ``"corrupt"`` once, when ``nbytes`` more have passed.

        Of what the serving end sends; with ``asks``, of what it is sent.
        """
        self.struck.clear()
        self._left, self._fault, self._asks = nbytes, fault, asks

    def let_go(self) -> None:
        """Let through what is held."""
        self._gate.set()

    def heal(self) -> None:
        self._fault = ""
        self._gate.set()
        super().heal()

    def close(self) -> None:
        self._gate.set()
        super().close()

    def _pass(self, line: _Line, target: socket.socket, part: bytes, asks: bool) -> None:
        if asks != self._asks or not self._fault:
            if asks == self._asks:
                self._gate.wait()
            line.send(target, part)
            return
        before, self._left = self._left, self._left - len(part)
        if self._left >= 0:
            line.send(target, part)
            return
        fault, self._fault = self._fault, ""
        line.send(target, part[:before])
        if fault == "corrupt":
            part = part[:before] + bytes([part[before] ^ 0x41]) + part[before + 1 :]
        elif fault == "hold":
            self._gate.clear()
        self.struck.set()
        if fault == "cut":
            line.reset()
            return
        self._gate.wait()
        self._flows.wait()
        line.send(target, part[before:])


@dataclass(eq=False)
class Rule:
    """What becomes of messages: of requests of these operations, or of the replies to them.

    ``fate`` is ``"lose"``, ``"repeat"``, ``"hold"`` (until `let_go`) or ``"swap"`` (after the next message of
    its connection), for the next ``times`` messages.
    """

    ops: frozenset[str]
    replies: bool
    fate: str
    times: int = 1
    met: threading.Event = field(default_factory=threading.Event)
    held: list[Callable[[], None]] = field(default_factory=list)

    def let_go(self) -> None:
        """Send what is held, and hold no more."""
        self.times = 0
        held, self.held = self.held, []
        for send in held:
            with contextlib.suppress(OSError):
                send()


class ControlWire(Wire):
    """A wire for control messages."""

    def __init__(self, here: str, there: str, port: int) -> None:
        self._rules: list[Rule] = []
        #: Every message that came by: operation and whether it is a reply.
        self.seen: list[tuple[str, bool]] = []
        super().__init__(here, there, port)

    def rule(self, ops: str, fate: str, *, replies: bool = False, times: int = 1) -> Rule:
        """Add a rule for operations, separated by blanks."""
        rule = Rule(frozenset(ops.split()), replies, fate, times)
        self._rules.append(rule)
        return rule

    def heal(self) -> None:
        rules, self._rules = self._rules, []
        super().heal()
        for rule in rules:
            rule.let_go()

    def _parts(self, line: _Line, source: socket.socket, asks: bool) -> Iterator[bytes]:
        """Yield the greeting as it comes (each side waits for the other's), then whole frames."""
        left = _GREETING
        while left:
            part = source.recv(left)
            if not part:
                raise ConnectionResetError
            left -= len(part)
            yield part
        while True:
            flags = _exactly(source, 1)
            length = _exactly(source, 8 if flags[0] & _LONG else 1)
            body = _exactly(source, int.from_bytes(length, "big"))
            frame = flags + length + body
            yield frame if flags[0] & (_COMMAND | _MORE) else _Message(frame)

    def _pass(self, line: _Line, target: socket.socket, part: bytes, asks: bool) -> None:
        op = _operation(line, part, asks)
        rule = next((r for r in self._rules if op in r.ops and r.replies != asks and r.times > 0), None) if op else None
        if op:
            self.seen.append((op, not asks))
        if rule is not None:
            rule.times -= 1
            fate = rule.fate
            if fate == "hold":
                rule.held.append(lambda: line.send(target, part))
            elif fate == "swap":
                line.late[target] = part
            elif fate == "repeat":
                line.send(target, part + part)
            rule.met.set()
            return
        line.send(target, part + line.late.pop(target, b""))


@dataclass(eq=False)
class _Line:
    """One connection."""

    near: socket.socket
    far: socket.socket
    #: Operations by request number, and messages that wait for the next one.
    ops: dict[int, str] = field(default_factory=dict)
    late: dict[socket.socket, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: set[bool] = field(default_factory=set)

    @property
    def ended(self) -> bool:
        return self.near.fileno() < 0

    def send(self, target: socket.socket, data: bytes) -> None:
        with self._lock:
            target.sendall(data)

    def over(self, asks: bool) -> None:
        self._over.add(asks)
        if len(self._over) == 2:
            self.reset()

    def reset(self) -> None:
        for sock in (self.near, self.far):
            _reset(sock)


def _operation(line: _Line, part: bytes, asks: bool) -> str:
    """Return which operation a message asks for or answers; empty for anything else."""
    if not isinstance(part, _Message):
        return ""
    message = msgpack.unpackb(part[9 if part[0] & _LONG else 2 :], strict_map_key=False)
    if asks:
        line.ops[message["id"]] = message["op"]
    return str(line.ops.get(message["id"], ""))


def _exactly(source: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = source.recv(size - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in it
    sock.close()
