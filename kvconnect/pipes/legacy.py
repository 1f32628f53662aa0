"""Pipes of vLLM's former shape: ``send_tensor``, ``recv_tensor`` and ``close``, made from a configuration.

::

    OldPipe = adopt(their.OldPipe, "old", Traits(reach=Reach.HOST))  # named in an entry point, as any pipe

The two ends of such a pipe are ranks 0 and 1 of ``kv_parallel_size`` 2 and meet at ``kv_ip``:``kv_port``, where
rank 0 listens. Both have to send and to receive, as vLLM's own did. What the former shape had no words for cannot
be added from outside: `Pipe.abort` is its ``close``, and deadlines and the other end's end are as it has them.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from kvconnect.config import parse_options
from kvconnect.errors import ClosedError, DeadlineError, HandshakeError, as_ours
from kvconnect.pipes.alone import Alone
from kvconnect.pipes.base import Pipe, PipeSpec, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LegacyOptions:
    """Options of adopted pipes.

    Args:
        bind_host: where the end that serves listens, and where the other one connects, if that is another
            address than the engine's.

    """

    bind_host: str | None = None


def adopt(legacy: Callable[..., Any], name: str, traits: Traits) -> type[Pipe]:
    """Make a pipe class of one of vLLM's former shape.

    Its options are `LegacyOptions`.

    Args:
        legacy: called as ``legacy(local_rank, config, device=…, port_offset=0)``, where ``config`` has ``kv_ip``,
            ``kv_port``, ``kv_rank``, ``kv_parallel_size`` and ``kv_buffer_device``. It may wait for the other end.
        name: what users write under ``"pipe"``.
        traits: what it can do.

    """
    body = {"name": name, "traits": traits, "legacy": staticmethod(legacy), "__module__": legacy.__module__}
    return type(getattr(legacy, "__name__", name), (_AdoptedPipe,), body)


class _AdoptedPipe(Pipe):
    """Adds to ``legacy`` what the contract asks for and can be added from outside."""

    legacy: ClassVar[Callable[..., Any]]

    def __init__(self, spec: PipeSpec) -> None:
        self._sending, self._receiving = Alone("send"), Alone("receive")
        self._limit_s, self._closed, self._ending = spec.timeout_s, False, threading.Lock()
        if spec.side == "serves":
            at, _ = spec.address(parse_options(LegacyOptions, spec.options, "pipe").bind_host)
            with socket.create_server((at, 0)) as free:
                host, port = free.getsockname()[:2]
            spec.exchange({"host": host, "port": port})
        else:
            theirs = spec.exchange({})
            host, port = theirs.get("host"), theirs.get("port")
            if not isinstance(host, str) or not isinstance(port, int):
                raise HandshakeError(f"{self.name!r} wants a host and a port, the other end sent {theirs!r:.200}")
            spec.check(f"{host}:{port}")
        config = SimpleNamespace(
            kv_ip=host,
            kv_port=port,
            kv_rank=0 if spec.side == "serves" else 1,
            kv_parallel_size=2,
            kv_buffer_device=spec.device.partition(":")[0],
        )
        self._made: Future[Any] = Future()
        # On a thread of its own, since it may wait for the other end, which may not be opened before this returns.
        threading.Thread(
            target=self._make, args=(config, spec.device), name="kvconnect-pipe-legacy-opens", daemon=True
        ).start()

    def _make(self, config: SimpleNamespace, device: str) -> None:
        local_rank = int(device.partition(":")[2] or 0)
        try:
            self._made.set_result(self.legacy(local_rank, config, device=device, port_offset=0))
        except Exception as error:  # noqa: BLE001 - a third party's may raise anything; whoever sends or receives hears it
            self._made.set_exception(error)
        if self._closed:
            self.close()

    def send_tensor(self, tensor: Tensor | None) -> None:
        """Send, as ``legacy`` does."""
        with self._sending:
            self._call("send_tensor", tensor)

    def recv_tensor(self) -> Tensor | None:
        """Receive, as ``legacy`` does."""
        with self._receiving:
            got: Tensor | None = self._call("recv_tensor")
            return got

    def close(self) -> None:
        """Close it, at once if it is open, else as soon as it is."""
        self._closed = True
        if self._made.done() and self._made.exception() is None and self._ending.acquire(blocking=False):
            try:
                self._made.result().close()
            except Exception as error:  # a third party's may raise anything
                raise as_ours(error, f"pipe {self.name!r} failed to close: ") from error

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            if not self._closed:
                return getattr(self._made.result(self._limit_s), method)(*arguments)
        except TimeoutError as error:
            if not self._closed:
                raise DeadlineError(f"{method} of pipe {self.name!r} took too long: {error}") from error
        except Exception as error:  # likewise
            if not self._closed:
                raise as_ours(error, f"{method} of pipe {self.name!r} failed: ") from error
        raise ClosedError("this end was closed")
