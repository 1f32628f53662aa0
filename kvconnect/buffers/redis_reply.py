"""A chunk out of Redis straight into its place: a client's parser would copy it three times on the way."""

from __future__ import annotations

from typing import Any, Final

#: ``$<length>\r\n`` is shorter.
_MAX_HEAD: Final = 24


def read_into(pool: Any, name: str, into: memoryview) -> bool:
    """Get a value of just so many bytes; ``False`` if the answer is anything else, which the client may then read.

    Args:
        pool: of connections, redis-py's.
        name: the key.
        into: memory for the value.

    Raises:
        redis.RedisError: the server cannot be reached, or has not sent all of it in time.

    """
    import redis

    try:
        connection = pool.get_connection()
    except redis.ConnectionError:
        return False  # closed while it was opened: the client tries others
    whole = False
    try:
        connection.send_command("GET", name)
        sock = connection._sock  # noqa: SLF001 - redis-py has no other way to the bytes themselves
        whole = sock is not None and _bulk(sock, into)
    except TimeoutError as error:
        raise redis.TimeoutError("Timeout reading a chunk") from error
    except (OSError, redis.ConnectionError):
        pass  # it was idle, and closed meanwhile: the client opens another
    finally:
        if not whole:
            connection.disconnect()  # or the next to ask would read the rest of this answer
        pool.release(connection)
    return whole


def _bulk(sock: Any, into: memoryview) -> bool:
    """Read one reply: its head byte by byte, since what follows belongs elsewhere."""
    head = b""
    while not head.endswith(b"\r\n"):
        byte = sock.recv(1)
        if not byte or len(head) == _MAX_HEAD:
            return False
        head += byte
    if head != b"$%d\r\n" % into.nbytes:
        return False
    tail = bytearray(2)
    return _fill(sock, into) and _fill(sock, memoryview(tail)) and tail == b"\r\n"


def _fill(sock: Any, into: memoryview) -> bool:
    while into:
        count = sock.recv_into(into)
        if not count:
            return False
        into = into[count:]
    return True
