"""`RedisBuffer`: entries in a Redis server, which any number of engines share.

An entry is a hash with its manifest and the name of its draft, which its chunks are
called after: ``<prefix>:e:<name>`` while it is offered, ``<prefix>:t:<name>:<grant>``
while somebody has it. Each decision is a script, that the server runs whole. Everything
has a time to live, so that nothing stays that nobody knows of; what the server itself
evicts, if only in part, is an entry that is gone. One server, not a cluster: scripts name keys as they go.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from kvconnect.buffers.redis_reply import read_into
from kvconnect.buffers.store import Found, Store, Stored, StoreOptions
from kvconnect.buffers.store_table import StoreBuffer
from kvconnect.config import PATH
from kvconnect.errors import BrokenError, BufferFullError, ClosedError, ConfigError, LoadError
from kvconnect.pipes.base import YES, Verdict

#: How long drafts live; and how much longer entries do than they are handed out, for who reads one at its end.
_DRAFT_S: Final = 900
#: Connections of one process, one for each thread that may ask at a time.
_CONNECTIONS: Final = 8

# ARGV[1] is the prefix. Chunks are listed in a hash, ``k``, with their lengths.
_COMMON: Final = """
local p = ARGV[1] .. ':'
local function now() local t = redis.call('TIME'); return t[1] + t[2] / 1e6 end
local function drop_chunks(draft)
  for _, chunk in ipairs(redis.call('HKEYS', p .. 'k:' .. draft)) do
    redis.call('UNLINK', p .. 'c:' .. draft .. ':' .. chunk)
  end
  redis.call('UNLINK', p .. 'k:' .. draft)
end
-- Bytes of the chunks that are there: a server may evict some, or have been restarted since the first was written.
local function bytes_of(draft)
  local nbytes, chunks = 0, redis.call('HGETALL', p .. 'k:' .. draft)
  for i = 1, #chunks, 2 do
    nbytes = nbytes + chunks[i + 1] * redis.call('EXISTS', p .. 'c:' .. draft .. ':' .. chunks[i])
  end
  return nbytes
end
local function drop(entry)
  local draft = redis.call('HGET', entry, 'draft')
  if not draft then return 0 end
  drop_chunks(draft)
  redis.call('UNLINK', entry)
  return 1
end
local function whole(entry)
  local manifest, draft, nbytes = unpack(redis.call('HMGET', entry, 'manifest', 'draft', 'nbytes'))
  if manifest and bytes_of(draft) + #manifest == tonumber(nbytes) then return {manifest, draft} end
  drop(entry)
  return false
end
local function give_back(name, grant)
  local taken, offered = p .. 't:' .. name .. ':' .. grant, p .. 'e:' .. name
  if redis.call('ZREM', p .. 'taken', name .. ':' .. grant) == 0 then return end
  if redis.call('EXISTS', taken) == 0 then return end
  if redis.call('EXISTS', offered) == 1 then drop(taken) return end
  redis.call('RENAME', taken, offered)
  redis.call('ZADD', p .. 'offered', redis.call('HGET', offered, 'made'), name)
end
"""
_SCRIPTS: Final = {
    "publish": """
local draft, name, manifest, nbytes, replace, ttl = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local entry = p .. 'e:' .. name
if bytes_of(draft) ~= tonumber(nbytes) then drop_chunks(draft) return -1 end
if redis.call('EXISTS', entry) == 1 then
  if replace == '0' then drop_chunks(draft) return 0 end
  drop(entry)
end
for _, chunk in ipairs(redis.call('HKEYS', p .. 'k:' .. draft)) do
  redis.call('EXPIRE', p .. 'c:' .. draft .. ':' .. chunk, ttl)
end
redis.call('EXPIRE', p .. 'k:' .. draft, ttl)
local made = string.format('%.6f', now())
redis.call('HSET', entry, 'draft', draft, 'manifest', manifest, 'nbytes', nbytes + #manifest, 'made', made)
redis.call('EXPIRE', entry, ttl)
redis.call('ZADD', p .. 'offered', made, name)
return 1
""",
    "find": "return whole(p .. 'e:' .. ARGV[2])",
    "take": """
local name, grant, lease = ARGV[2], ARGV[3], ARGV[4]
local entry, taken = p .. 'e:' .. name, p .. 't:' .. name .. ':' .. grant
-- It is there already if this is asked again because the answer was lost.
local found = whole(taken)
if not found then
  found = whole(entry)
  if not found then return false end
  redis.call('RENAME', entry, taken)
  redis.call('ZREM', p .. 'offered', name)
end
redis.call('ZADD', p .. 'taken', now() + lease, name .. ':' .. grant)
return found
""",
    "renew": """
local member = ARGV[2] .. ':' .. ARGV[3]
if not redis.call('ZSCORE', p .. 'taken', member) then return 0 end
redis.call('ZADD', p .. 'taken', now() + ARGV[4], member)
return 1
""",
    "give_back": "give_back(ARGV[2], ARGV[3])",
    "drop": """
local name, grant = ARGV[2], ARGV[3]
if grant == '' then
  redis.call('ZREM', p .. 'offered', name)
  return drop(p .. 'e:' .. name)
end
redis.call('ZREM', p .. 'taken', name .. ':' .. grant)
return drop(p .. 't:' .. name .. ':' .. grant)
""",
    "discard": "drop_chunks(ARGV[2])",
    "entries": """
local found = {}
local function list(index, kind)
  local members = redis.call('ZRANGE', p .. index, 0, -1, 'WITHSCORES')
  for i = 1, #members, 2 do
    local member = members[i]
    local entry = redis.call('HMGET', p .. kind .. ':' .. member, 'nbytes', 'made')
    if entry[1] then
      table.insert(found, {index, member, entry[1], entry[2], members[i + 1]})
    else
      redis.call('ZREM', p .. index, member)
    end
  end
end
list('offered', 'e')
list('taken', 't')
return found
""",
    "touch": "redis.call('ZADD', p .. 'offered', 'XX', now(), ARGV[2])",
    "mend": """
for _, member in ipairs(redis.call('ZRANGEBYSCORE', p .. 'taken', '-inf', now())) do
  local name, grant = string.match(member, '(%x+):(%x+)')
  give_back(name, grant)
end
""",
}


@dataclass(frozen=True, kw_only=True)
class RedisOptions(StoreOptions):
    """Options of the buffer ``redis``.

    Args:
        url: ``redis://host:port/database``, ``rediss://…`` for TLS (``?ssl_ca_certs=<file>`` names the authority),
            ``unix:///path/to/socket``; a user's name may be in it.
        password_file: a file with the password, which does not belong into a configuration that is logged.
        prefix: what all keys begin with.
        timeout_s: the longest wait for the server to take or to send a chunk.

    """

    url: str = "redis://127.0.0.1:6379/0"
    password_file: str | None = None
    prefix: str = "kvconnect"
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        """Check; raise `ConfigError`."""
        super().__post_init__()
        # Not repeated, nor chained: it may hold a password.
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError:
            raise ConfigError(
                f"{PATH}.buffer.url cannot be used: it is no address, or not quoted where needed"
            ) from None
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ConfigError(f"{PATH}.buffer.url must begin with redis://, rediss:// or unix://")
        if not self.prefix or self.timeout_s <= 0:
            raise ConfigError(f"{PATH}.buffer.prefix must not be empty, and timeout_s be greater than 0")


class RedisStore(Store):
    """A server. See the module."""

    def __init__(self, options: RedisOptions) -> None:
        """Connect to nothing yet.

        Raises:
            ConfigError: the address or the password cannot be used.

        """
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._closed = False
        self._prefix, self._ttl_s = options.prefix, int(options.max_age_s) + _DRAFT_S
        try:
            password = Path(options.password_file).read_text("utf-8").strip() if options.password_file else None
            pool = redis.BlockingConnectionPool.from_url(
                options.url,
                max_connections=_CONNECTIONS,
                timeout=options.timeout_s,
                socket_timeout=options.timeout_s,
                socket_connect_timeout=options.timeout_s,
                retry=Retry(NoBackoff(), 0),  # not for all, see `publish`
                **({"password": password} if password else {}),
            )
        except OSError as error:
            raise ConfigError(
                f"{PATH}.buffer.password_file {options.password_file!r} cannot be read: {error.strerror}"
            ) from error
        except (ValueError, TypeError, redis.RedisError) as error:
            raise ConfigError(f"{PATH}.buffer.url cannot be used: {error}") from error
        # Over another connection as long as there may be one that died with the first, but not after waiting for as
        # long as anybody may.
        self._again = Retry(NoBackoff(), _CONNECTIONS, (redis.ConnectionError,))
        self._client: Any = redis.Redis(connection_pool=pool)
        self._scripts = {name: self._client.register_script(_COMMON + text) for name, text in _SCRIPTS.items()}

    # -- writing --------------------------------------------------------------------

    def put(self, draft: str, part: int, offset: int, data: memoryview) -> None:
        """Set a chunk. See `Store.put`."""
        listed, chunk = f"{self._prefix}:k:{draft}", f"{part}:{offset}"

        def put() -> None:
            pipe = self._client.pipeline(transaction=False)
            pipe.set(f"{self._prefix}:c:{draft}:{chunk}", data, ex=_DRAFT_S)
            pipe.hset(listed, chunk, data.nbytes)
            pipe.expire(listed, _DRAFT_S)
            pipe.execute()

        with _mapped():
            self._retried(put)

    def publish(self, draft: str, name: str, manifest: bytes, *, nbytes: int, replace: bool) -> bool:
        """Name a draft. See `Store.publish`.

        Not asked again where the answer is lost: the entry may have been published, taken and read since.
        """
        arguments = (self._prefix, draft, name, manifest, nbytes, int(replace), self._ttl_s)
        with _mapped():
            done = self._scripts["publish"](args=arguments)
        if done < 0:
            raise BrokenError("the Redis server has lost chunks of the draft: it was restarted, or has no room")
        return bool(done)

    def discard(self, draft: str) -> None:
        """Delete a draft's chunks. See `Store.discard`."""
        self._run("discard", draft)

    # -- reading --------------------------------------------------------------------

    def find(self, name: str) -> Found | None:
        """Read a manifest. See `Store.find`."""
        found = self._run("find", name)
        return None if found is None else Found(found[0], found[1].decode())

    def take(self, name: str, grant: str, lease_s: float) -> Found | None:
        """Rename an entry, if it is still there. See `Store.take`."""
        found = self._run("take", name, grant, lease_s)
        return None if found is None else Found(found[0], found[1].decode())

    def get(self, place: str, part: int, offset: int, into: memoryview) -> None:
        """Get a chunk. See `Store.get`."""
        name = f"{self._prefix}:c:{place}:{part}:{offset}"
        with _mapped():
            if read_into(self._client.connection_pool, name, into):
                return
            if self._closed:
                raise ClosedError("the store was closed")
            chunk = self._retried(lambda: self._client.get(name))
        if chunk is None:
            raise LoadError("the entry is gone")
        if len(chunk) != into.nbytes:
            raise LoadError(f"a chunk of the entry has {len(chunk)} bytes, not {into.nbytes}")
        into[:] = chunk

    def renew(self, name: str, grant: str, lease_s: float) -> bool:
        """Put the end of a lease off. See `Store.renew`."""
        return bool(self._run("renew", name, grant, lease_s))

    def give_back(self, name: str, grant: str) -> None:
        """Rename an entry back. See `Store.give_back`."""
        self._run("give_back", name, grant)

    # -- keeping --------------------------------------------------------------------

    def drop(self, name: str, grant: str | None = None) -> bool:
        """Delete an entry. See `Store.drop`."""
        return bool(self._run("drop", name, grant or ""))

    def touch(self, name: str) -> None:
        """Move an entry to the end of the index of what is offered. See `Store.touch`."""
        self._run("touch", name)

    def entries(self) -> list[Stored]:
        """Read both indices: one is ordered by last use, the other by the ends of leases. See `Store.entries`."""
        return [
            Stored(member.decode().partition(":")[0], int(nbytes), float(made), index == b"taken", float(score))
            for index, member, nbytes, made, score in self._run("entries")
        ]

    def mend(self) -> None:
        """Give back what takers left behind; drafts expire by themselves. See `Store.mend`."""
        self._run("mend")

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self._client.close()
        self._client.connection_pool.disconnect()

    def _run(self, script: str, *arguments: str | float) -> Any:
        with _mapped():
            return self._retried(lambda: self._scripts[script](args=[self._prefix, *arguments]))

    def _retried(self, ask: Callable[[], Any]) -> Any:
        """Ask what may be asked twice: it may have been done although the answer is lost."""
        return self._again.call_with_retry(ask, lambda _: None)


class RedisBuffer(StoreBuffer):
    """Entries in a Redis server. See `kvconnect.buffers.store_table.StoreBuffer`."""

    name: ClassVar[str] = "redis"
    options_type: ClassVar[type[StoreOptions]] = RedisOptions

    @classmethod
    def availability(cls) -> Verdict:
        """Whether the client library is installed."""
        if importlib.util.find_spec("redis") is None:
            return Verdict(False, "redis-py is not installed", "pip install 'kvconnect[redis]'")
        return YES

    @classmethod
    def open_store(cls, options: StoreOptions) -> Store:
        """Open a client."""
        if not isinstance(options, RedisOptions):
            raise ConfigError(f"RedisOptions are needed, not {type(options).__name__}")
        return RedisStore(options)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    import redis

    try:
        yield
    except redis.OutOfMemoryError as error:
        raise BufferFullError(f"the Redis server has no room: {error}") from error
    except redis.RedisError as error:
        raise BrokenError(f"the Redis server failed: {type(error).__name__}: {error}") from error
    except ValueError as error:  # what redis-py reads from a connection that `RedisStore.close` has closed meanwhile
        raise ClosedError("the store was closed") from error
