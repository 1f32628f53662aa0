"""A Redis server as a lookup buffer: its laws, access, memory, and its death."""

import contextlib
import re
import secrets
import threading
import time
import traceback
from pathlib import Path

import pytest

from kvconnect.buffers.base import Claim
from kvconnect.buffers.redis import RedisBuffer, RedisOptions, RedisStore
from kvconnect.buffers.store_manifest import name_of
from kvconnect.errors import BrokenError, BufferFullError, ConfigError, LoadError
from kvconnect.testing.buffer_laws import LAWS, ROOM_BYTES, Ends, key, tensor
from kvconnect.testing.buffer_tests import BufferTests
from tests.buffers.engines import eventually, is_miss
from tests.buffers.redis_server import RedisServer
from tests.buffers.stores import Stall, backend, pair
from tests.buffers.wired_redis import WiredRedis

OUTLIVES = "an_entry_that_is_gone_is_reported_never_halved"  # a server's entries outlive who has written them


def table(url, prefix, policy="wait", ttl_s=600.0, wait_s=20.0, **options):
    options = {"capacity_bytes": ROOM_BYTES, "chunk_bytes": 1 << 16, "max_age_s": ttl_s, **options}
    return RedisBuffer(RedisOptions(url=url, prefix=prefix, **options), policy, wait_s)


class TestOneTable(BufferTests):
    @pytest.fixture(autouse=True)
    def server(self, redis_server):
        self.url = redis_server.url

    def open_ends(self, *, policy, ttl_s, wait_s):
        buffer = table(self.url, secrets.token_hex(4), policy, ttl_s, wait_s)
        return Ends(buffer, buffer)

    def shared_options(self):
        return {"options": RedisOptions(url=self.url, prefix=secrets.token_hex(4))}


class TestTwoTablesOfOneServer(TestOneTable):
    test_shared_law = None  # the same again

    def open_ends(self, *, policy, ttl_s, wait_s):
        prefix = secrets.token_hex(4)
        return Ends(*(table(self.url, prefix, policy, ttl_s, wait_s) for _ in range(2)))

    @pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != OUTLIVES])
    def test_law(self, open_, law):
        law(open_)


@pytest.fixture
def open_table(redis_server):
    tables, prefix = [], secrets.token_hex(4)

    def make(**options):
        tables.append(table(redis_server.url, prefix, **options))
        return tables[-1]

    yield make
    for each in tables:
        each.close()


def test_what_a_dead_taker_had_is_offered_again(open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1)])
    (name,) = [entry.name for entry in buffer._store.entries()]
    assert buffer._store.take(name, "aa", 0.01)
    threading.Event().wait(0.02)
    buffer._store.mend()
    assert not buffer._store.renew(name, "aa", 60.0)
    assert buffer.drop_select(key(1)) is not None


def test_nothing_is_left_and_nothing_stays_for_ever(redis_server, open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1, 200_000)])
    buffer.insert(key(1), [tensor(2, 200_000)])
    keys = redis_server.client.keys(f"{buffer._options.prefix}:*")
    assert len(keys) == 1 + 1 + 4 + 1  # entry, list of chunks, chunks, index
    assert [name for name in keys if redis_server.client.ttl(name) < 0] == [
        f"{buffer._options.prefix}:offered".encode()
    ]
    buffer.drop_select(key(1))
    assert redis_server.client.keys(f"{buffer._options.prefix}:*") == []


def test_what_the_server_has_evicted_is_gone(redis_server, open_table):
    buffer = open_table()
    buffer.insert(key(1), [tensor(1, 200_000)])
    grant = buffer.claim(key(1), "r")
    redis_server.client.delete(redis_server.client.keys(f"{buffer._options.prefix}:c:*")[0])
    with pytest.raises(LoadError, match="gone"):
        grant.tensors()
    grant.abandon()
    assert buffer.drop_select(key(1)) is None, "half an entry was offered"
    buffer.insert(key(1), [tensor(1)])
    redis_server.client.delete(*redis_server.client.keys(f"{buffer._options.prefix}:e:*"))
    assert buffer.drop_select(key(1)) is None
    assert buffer._store.entries() == []


def test_a_shared_entry_that_has_lost_a_chunk_makes_way_for_a_whole_one(redis_server, open_table):
    buffer = open_table(mode="share")
    buffer.insert(key(1), [tensor(1, 200_000)])
    redis_server.client.delete(redis_server.client.keys(f"{buffer._options.prefix}:c:*")[0])
    assert buffer._store.find(name_of(key(1))) is None
    assert buffer._store.entries() == []


# -- access and limits ------------------------------------------------------------------


def test_a_password_is_read_from_a_file(tmp_path):
    word = tmp_path / "password"
    word.write_text("sesame\n")
    with RedisServer("--requirepass", "sesame", password="sesame") as server:  # noqa: S106 - a test's own
        buffer = table(server.url, "p", password_file=str(word))
        buffer.insert(key(1), [tensor(1)])
        buffer.close()
        word.write_text("guess")
        buffer = table(server.url, "p", password_file=str(word))
        with pytest.raises(BrokenError, match="Authentication"):
            buffer.insert(key(1), [tensor(1)])
        buffer.close()


def test_tls_is_an_address_and_an_authority(tmp_path, unused_port):
    trustme = pytest.importorskip("trustme", reason="certificates for a test are made by trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    ca, own = str(tmp_path / "ca.pem"), str(tmp_path / "server.pem")
    tls = ("--port", "0", "--tls-port", str(unused_port), "--tls-cert-file", own, "--tls-key-file", own)
    tls += ("--tls-ca-cert-file", ca, "--tls-auth-clients", "no")
    address = f"rediss://127.0.0.1:{unused_port}/0"
    with RedisServer(*tls, url=f"{address}?ssl_ca_certs={ca}") as server:
        buffer = table(server.url, "t")
        buffer.insert(key(1), [tensor(1)])
        assert buffer.drop_select(key(1)) is not None
        buffer.close()
        stranger = table(address, "t")
        with pytest.raises(BrokenError, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.match([key(1)])
        stranger.close()
        misled = table(server.url.replace("127.0.0.1", "localhost"), "t")
        with pytest.raises(BrokenError, match=r"(?i)hostname mismatch"):
            misled.match([key(1)])
        misled.close()


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_without_room_is_a_full_buffer():
    with RedisServer("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        buffer = table(server.url, "m", capacity_bytes=1 << 30)
        with pytest.raises(BufferFullError, match="no room"):
            buffer.insert(key(1), [tensor(1, 8 << 20)])
        buffer.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "http://x"}, r"buffer\.url must begin with redis://"),
        ({"url": "redis://host/0?db=x"}, r"buffer\.url cannot be used"),
        ({"url": "redis://host:port"}, r"buffer\.url cannot be used"),
        ({"prefix": ""}, r"buffer\.prefix must not be empty"),
        ({"password_file": "/nowhere"}, r"buffer\.password_file '/nowhere' cannot be read"),
    ],
)
def test_wrong_options_name_their_path_and_the_cure(options, said):
    with pytest.raises(ConfigError, match=said):
        RedisStore(RedisOptions(**options)).close()


def everything(store):
    """Whatever engines ask of a store, once."""
    name, data, room = "0" * 32, memoryview(b"8 bytes."), bytearray(8)
    for draft, replace in (("a1", False), ("a2", True), ("a3", False)):
        store.put(draft, 0, 0, data)
        assert store.publish(draft, name, b"manifest", nbytes=8, replace=replace) == (draft != "a3")
    store.put("a4", 0, 0, data)
    store.discard("a4")
    store.get(store.find(name).place, 0, 0, memoryview(room))
    assert room == data
    store.touch(name)
    assert store.take(name, "c1", 30) is not None
    assert store.renew(name, "c1", 30)
    assert [entry.taken for entry in store.entries()] == [True]
    store.give_back(name, "c1")
    assert store.take(name, "c2", -1) is not None
    store.mend()
    assert store.drop(name)
    assert store.entries() == []


def test_the_user_on_the_page_may_do_what_engines_do_and_no_more(tmp_path):
    page = Path(__file__).parents[2].joinpath("docs", "security.md").read_text("utf-8")
    (line,) = re.findall(r"^ACL SETUSER .*$", page, re.MULTILINE)
    granted = {word[1:] for word in line.split() if word.startswith("+")}
    (tmp_path / "password").write_text("PASSWORD")
    with RedisServer(url="unix://{socket}") as server:
        server.client.execute_command(*line.split())
        server.client.config_resetstat()

        def user(prefix):
            url = server.url.replace("unix://", "unix://kvconnect@")
            options = RedisOptions(url=url, password_file=str(tmp_path / "password"), prefix=prefix)
            return contextlib.closing(RedisStore(options))

        with user("kvconnect") as store:
            everything(store)
        used = {name.removeprefix("cmdstat_") for name in server.client.info("commandstats")}
        assert used - {"hello", "auth", "select", "config|resetstat", "client|setinfo"} == granted
        with user("others") as store, pytest.raises(BrokenError, match="NoPermission"):
            everything(store)


@pytest.mark.parametrize("url", ["redis://:s3/same@host", "redis://:s3same\u2100@host", "http://:s3same@host"])
def test_a_password_in_an_address_that_is_none_stays_out_of_the_error(url):
    with pytest.raises(ConfigError) as caught:
        RedisOptions(url=url)
    assert "s3" not in "".join(traceback.format_exception_only(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


# -- failures ---------------------------------------------------------------------------


@pytest.fixture
def server_of_its_own():
    with RedisServer() as server:
        yield server


@pytest.fixture
def store_of(server_of_its_own):
    with contextlib.closing(RedisStore(RedisOptions(url=server_of_its_own.url, timeout_s=1.0))) as store:
        yield store


def test_a_server_that_hangs_is_waited_for_once(server_of_its_own, store_of):
    chunk = memoryview(bytearray(100))
    store_of.put("d", 0, 0, chunk)
    server_of_its_own.stop()
    for ask in (lambda: store_of.put("d", 0, 0, chunk), lambda: store_of.get("d", 0, 0, chunk), store_of.entries):
        start = time.monotonic()
        with pytest.raises(BrokenError, match="Timeout"):
            ask()
        assert time.monotonic() - start < 1.9
    server_of_its_own.go_on()
    store_of.get("d", 0, 0, chunk)


@pytest.mark.parametrize("timeout_s", [0.2, 30.0], ids=["who asks gives up", "who asks waits on"])
def test_requests_do_not_wait_for_a_server_that_is_known_to_hang(server_of_its_own, timeout_s):
    with pair(backend("redis", url=server_of_its_own.url, timeout_s=timeout_s), lookup_timeout_s=0.5) as (p, d):
        p.put()
        server_of_its_own.stop()
        assert is_miss(d.find(request="first"), "unreachable" if timeout_s < 0.5 else "timeout")
        begun = time.monotonic()
        assert all(is_miss(d.find(request=f"next {n}"), "unreachable") for n in range(20))
        assert time.monotonic() - begun < 0.4
        server_of_its_own.go_on()
        eventually(lambda: isinstance(d.find(request=secrets.token_hex(4)), Claim))


def test_connections_that_were_closed_while_idle_are_replaced_unseen(server_of_its_own, store_of):
    store_of.mend()
    server_of_its_own.kill()
    server_of_its_own.start()
    store_of.mend()


def test_a_connection_that_is_closed_while_it_is_opened_or_before_its_answer_is_replaced_unseen():
    with WiredRedis() as redis, contextlib.ExitStack() as stack:
        stores = [stack.enter_context(contextlib.closing(RedisStore(RedisOptions(url=redis.url)))) for _ in range(2)]
        stores[0].put("d", 0, 0, memoryview(b"kv"))
        assert stores[0].publish("d", "e", b"manifest", nbytes=2, replace=True)
        into = memoryview(bytearray(2))
        redis.wire.after(0, "cut")
        stores[1].get("d", 0, 0, into)
        assert redis.wire.struck.is_set()
        assert into == b"kv"
        redis.wire.after(0, "cut")
        found = stores[1].take("e", "a", 60.0)
        assert redis.wire.struck.is_set()
        assert (found.manifest, found.place) == (b"manifest", "d")
        assert stores[0].take("e", "b", 60.0) is None
        redis.wire.after(0, "cut")
        assert [stored.taken for stored in stores[0].entries()] == [True]
        redis.wire.after(0, "cut")
        stores[1].give_back("e", "a")
        assert [stored.taken for stored in stores[0].entries()] == [False]


def test_an_entry_whose_publishing_got_no_answer_is_whole():
    with WiredRedis() as redis, contextlib.closing(RedisStore(RedisOptions(url=redis.url))) as store:
        store.publish("d0", "e0", b"manifest", nbytes=0, replace=True)  # the server knows the script from here on
        store.put("d1", 0, 0, memoryview(b"kv"))
        redis.wire.after(1, "cut")
        with pytest.raises(BrokenError):
            store.publish("d1", "e1", b"manifest", nbytes=2, replace=True)
        found, into = store.find("e1"), memoryview(bytearray(2))
        assert found.manifest == b"manifest"
        store.get(found.place, 0, 0, into)
        assert into == b"kv"


def test_a_server_that_dies_costs_a_failed_load_and_a_prompt_that_is_not_stored(monkeypatch):
    with RedisServer() as server, pair(backend("redis", url=server.url, timeout_s=2.0)) as (p, d):
        p.put()
        p.put(2)
        claim = d.claim()
        hang = Stall(monkeypatch, RedisStore, "get")
        load = d.reads(claim)
        assert hang.entered.wait(5)
        server.kill()
        hang.gate.set()
        with pytest.raises(BrokenError):
            load.wait(8)
        d.end.settle("r")
        assert is_miss(d.find(2, "next"), "unreachable")
        assert not p.put(3)
        assert p.count("not_stored_store_failed") == 1
        assert eventually(lambda: p.end.lent_blocks() == 0)


def test_what_is_no_chunk_of_that_length_leaves_connections_usable(store_of):
    store_of.put("d", 0, 0, memoryview(b"8 bytes."))
    for _ in range(20):
        with pytest.raises(LoadError, match="8 bytes, not 9"):
            store_of.get("d", 0, 0, memoryview(bytearray(9)))
        with pytest.raises(LoadError, match="gone"):
            store_of.get("d", 1, 0, memoryview(bytearray(8)))
    into = bytearray(8)
    store_of.get("d", 0, 0, memoryview(into))
    assert into == b"8 bytes."
