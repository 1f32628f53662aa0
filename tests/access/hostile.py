"""A hostile user: speaks ZeroMQ and msgpack by itself, and a legitimate pair that must not mind."""

import contextlib
import itertools
import socket
import threading

import msgpack
import zmq

from kvconnect.buffers.base import Miss, Want
from tests.buffers.engines import eventually, key

_BLOCKS = ((1, 2, 3),)


class Stranger:
    """A client of one control server that sends what it likes; nothing of kvconnect's is in it."""

    def __init__(self, endpoint, curve=None):
        """``curve``: the server's public key, and an own public and secret key."""
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if curve is not None:
            self.socket.curve_serverkey, self.socket.curve_publickey, self.socket.curve_secretkey = curve
        self.socket.connect(f"tcp://{endpoint.rpartition('@')[2]}")
        self._numbers = itertools.count(1)

    def send(self, op, body):
        """Ask; return the question's number."""
        number = next(self._numbers)
        # Whom a handshake has turned away has nobody to send to, and would wait for ever.
        with contextlib.suppress(zmq.Again):
            self.socket.send(msgpack.packb({"p": [1, 1], "id": number, "op": op, "body": body}), zmq.NOBLOCK)
        return number

    def hear(self, limit_s=5.0):
        """Return the next answer, or nothing if none comes."""
        return msgpack.unpackb(self.socket.recv()) if self.socket.poll(int(limit_s * 1000)) else None

    def ask(self, op, body, limit_s=5.0):
        """Ask; return the answer's body, the name of its error, or nothing if it is not answered."""
        self.send(op, body)
        answer = self.hear(limit_s)
        return None if answer is None else answer.get("error", answer.get("body"))

    def close(self):
        self._context.destroy(linger=0)


@contextlib.contextmanager
def stranger(endpoint, curve=None):
    one = Stranger(endpoint, curve)
    try:
        yield one
    finally:
        one.close()


class Traffic:
    """Hand-overs of a legitimate pair, one after another, on a thread."""

    def __init__(self, p, d):
        self._p, self._d = p, d
        self._numbers, self._stop, self._error = itertools.count(1000), threading.Event(), None
        self._done, self._moved = 0, threading.Condition()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    def _run(self):
        try:
            while not self._stop.wait(0.005):
                self._hand_over(next(self._numbers))
                with self._moved:
                    self._done += 1
                    self._moved.notify_all()
        except BaseException as error:  # noqa: BLE001 - it is told in the test's thread
            with self._moved:
                self._error = error
                self._moved.notify_all()

    def _hand_over(self, number):
        request = f"r{number}"
        claim = self._d.find(request, Want(key(number), ticket=self._p.offer(number, _BLOCKS)))
        assert not isinstance(claim, Miss), claim
        self._d.read(claim).wait(8)
        self._d.end.settle(request)
        assert self._d.block(10).tolist() == self._p.block(1).tolist()
        freed = []
        eventually(lambda: freed.extend(self._p.end.drain_released()) or _BLOCKS in freed)

    def goes_on(self, count=3, limit_s=10.0):
        """Wait for so many more hand-overs; none may fail."""
        with self._moved:
            target = self._done + count
            in_time = self._moved.wait_for(lambda: self._error is not None or self._done >= target, limit_s)
        if self._error is not None:
            raise self._error
        assert in_time, f"only {self._done - target + count} of {count} hand-overs in {limit_s} s"

    def end(self):
        self._stop.set()
        self._thread.join(10)


@contextlib.contextmanager
def traffic(p, d):
    """Hand-overs that go on before, meanwhile and afterwards."""
    pair = Traffic(p, d)
    try:
        pair.goes_on()
        yield pair
        pair.goes_on()
    finally:
        pair.end()


def hung_up(sock, limit_s=8.0):
    """Whether the other end closes a connection within this time."""
    sock.settimeout(limit_s)
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def connections(address, count, said=b""):
    """So many connections that begin to say something."""
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(count):
            socks.append(stack.enter_context(socket.create_connection(address, 5)))
            if said:
                socks[-1].sendall(said)
        yield socks


def address(endpoint):
    host, _, port = endpoint.rpartition("@")[2].rpartition(":")
    return host, int(port)
