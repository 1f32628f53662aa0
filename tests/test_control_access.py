"""Keys on the control channel, over real sockets: who is let in, and what a stranger can do."""

import contextlib
import socket
import struct
import threading
import time

import pytest
import zmq

from kvconnect import control, keys
from kvconnect.control import ControlClient, ControlServer, split
from kvconnect.errors import BrokenError, ConfigError, DeadlineError, HandshakeError
from kvconnect.keys import Keys, make_pair
from kvconnect.messages import pack_request
from kvconnect.testing.leaks import Holdings, assert_nothing_left

SECRET = "correct horse battery staple"  # noqa: S105 - of these tests only


def outcome(call, limit_s=8):
    return call.result(limit_s)


def secret_file(path, text=SECRET, mode=0o600):
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def shared(tmp_path, text=SECRET):
    return Keys.from_shared(secret_file(tmp_path / f"{abs(hash(text))}.key", text), "key_file")


def pairs(tmp_path, names):
    """Return the keys of engines of which each knows all."""
    public = {name: make_pair(str(tmp_path / f"{name}.key")) for name in names}
    return [
        Keys.from_pair(str(tmp_path / f"{name}.key"), public.values(), "secret_key_file", "peer_keys") for name in names
    ]


class Served:
    """A server that counts what reaches its handler, and clients to try on it."""

    def __init__(self, keys):
        self.heard = []
        self.server = ControlServer(keys=keys)
        self.server.handle("take", lambda body: self.heard.append(body) or {"taken": True})
        self.clients = []

    def client(self, keys=None):
        self.clients.append(ControlClient(keys=keys))
        return self.clients[-1]

    def ask(self, keys=None, at=None, limit_s=5):
        call = self.client(keys).call(at or self.server.endpoint, "take", {"x": 1}, limit_s)
        return outcome(call)

    def close(self):
        for client in self.clients:
            client.close()
        self.server.close()


@pytest.fixture
def serve():
    opened = []

    def start(keys):
        opened.append(Served(keys))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


# -- a shared secret ------------------------------------------------------------------------


def test_holders_of_the_secret_talk_and_bytes_around_it_do_not_matter(serve, tmp_path):
    served = serve(shared(tmp_path))
    padded = shared(tmp_path, f"\n{SECRET}\r\n")
    assert served.ask(padded) == {"taken": True}
    assert served.heard == [{"x": 1}]


@pytest.mark.parametrize("text", ["another secret of some length", SECRET + ".", SECRET.upper()])
def test_another_secret_is_turned_away_at_once(serve, tmp_path, text):
    served = serve(shared(tmp_path))
    started = time.monotonic()
    with pytest.raises(BrokenError, match="or another"):
        served.ask(shared(tmp_path, text), limit_s=30)
    assert time.monotonic() - started < 5
    assert served.heard == []


def test_a_client_without_a_key_is_turned_away_at_once(serve, tmp_path):
    served = serve(shared(tmp_path))
    with pytest.raises(BrokenError, match="has no key where we have one"):
        served.ask(None, limit_s=30)
    assert served.heard == []


def test_a_client_with_a_key_tells_a_server_without_one_nothing(serve, tmp_path):
    served = serve(None)
    with pytest.raises(BrokenError, match="has no key where we have one"):
        served.ask(shared(tmp_path), limit_s=30)
    assert served.heard == []


def test_strangers_do_not_keep_the_holder_out(serve, tmp_path):
    own = shared(tmp_path)
    served = serve(own)
    for _ in range(20):
        with pytest.raises(BrokenError):
            served.ask(None)
    assert served.ask(own) == {"taken": True}


def test_who_knows_the_servers_public_key_still_needs_an_allowed_one(serve, tmp_path, caplog):
    """The wire's own client, with everything right but its key pair."""
    own = shared(tmp_path)
    served = serve(own)
    public, secret = zmq.curve_keypair()
    stranger = Keys(own.server, keys.KeyPair(public, secret), own.allowed, own.servers, shared=True)
    with pytest.raises(BrokenError, match="does not let this engine's key in"):
        served.ask(stranger)
    assert served.heard == []
    assert "its key is not allowed" in caplog.text


# -- a pair for each ------------------------------------------------------------------------


def test_engines_that_know_each_others_keys_talk(serve, tmp_path):
    p, d = pairs(tmp_path, "pd")
    served = serve(p)
    assert served.ask(d, f"{p.name}@{served.server.endpoint}") == {"taken": True}
    assert served.ask(d) == {"taken": True}  # the only other key that it knows


def test_a_key_that_is_not_listed_is_neither_let_in_nor_asked(serve, tmp_path):
    p, d = pairs(tmp_path, "pd")
    own = make_pair(str(tmp_path / "stranger.key"))
    stranger = Keys.from_pair(str(tmp_path / "stranger.key"), [p.name], "s", "p")
    served = serve(p)
    with pytest.raises(BrokenError, match="does not let this engine's key in"):
        served.ask(stranger, f"{p.name}@{served.server.endpoint}")
    other = serve(stranger)
    with pytest.raises(HandshakeError, match="not among this engine's peer_keys"):
        served.ask(d, f"{own}@{other.server.endpoint}")
    assert served.heard == other.heard == []


def test_an_address_must_name_its_key_where_several_are_known(serve, tmp_path):
    p, d, _ = pairs(tmp_path, "pdx")
    served = serve(p)
    with pytest.raises(HandshakeError, match="<public key>@host:port"):
        served.ask(d)
    assert served.ask(d, f"{p.name}@{served.server.endpoint}") == {"taken": True}


def test_a_server_that_answers_under_a_trusted_key_must_have_it(serve, tmp_path):
    """Whoever sits at a peer's address without its secret key gets nothing to read."""
    p, d, x = pairs(tmp_path, "pdx")
    impostor = serve(x)
    with pytest.raises(BrokenError, match="or another"):
        impostor.ask(d, f"{p.name}@{impostor.server.endpoint}")
    assert impostor.heard == []


@pytest.mark.parametrize("named", [True, False])
def test_shared_secrets_and_key_pairs_do_not_mix(serve, tmp_path, named):
    p, _ = pairs(tmp_path, "pd")
    served = serve(p)
    at = f"{p.name}@{served.server.endpoint}" if named else served.server.endpoint
    with pytest.raises((HandshakeError, BrokenError), match="key"):
        served.ask(shared(tmp_path), at)
    assert served.heard == []


def test_an_engine_without_a_key_is_told_that_the_address_needs_one(serve, tmp_path):
    p, _ = pairs(tmp_path, "pd")
    served = serve(p)
    with pytest.raises(HandshakeError, match="this engine has none"):
        served.ask(None, f"{p.name}@{served.server.endpoint}")


# -- a stranger that speaks the protocol itself ---------------------------------------------


class Tap:
    """Between a client and a server: passes bytes on, keeps those of the client, may send some twice."""

    def __init__(self, port, twice=None):
        self.seen = []
        self._port, self._twice = port, twice
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._socks = [self._listening]
        self._threads = [threading.Thread(target=self._run, name="tap", daemon=True)]
        self._threads[0].start()

    def _run(self):
        client, _ = self._listening.accept()
        server = socket.create_connection(("127.0.0.1", self._port))
        self._socks += [client, server]
        back = threading.Thread(target=self._pass, args=(server, client, lambda data: [data]), daemon=True)
        self._threads.append(back)
        back.start()
        self._pass(client, server, self._keep)

    def _keep(self, data):
        self.seen.append(data)
        return [data, data] if self._twice and self._twice(data) else [data]

    @staticmethod
    def _pass(source, sink, change):
        try:
            while data := source.recv(1 << 16):
                for part in change(data):
                    sink.sendall(part)
        except OSError:
            pass  # one of the two has gone
        for sock in (source, sink):
            sock.close()

    def close(self):
        for sock in self._socks:
            with contextlib.suppress(OSError):  # gone already
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)


@pytest.fixture
def tapped():
    taps = []

    def start(*args, **options):
        taps.append(Tap(*args, **options))
        return taps[-1]

    yield start
    for tap in taps:
        tap.close()


def replay(port, parts, pause_s=0.05):
    """Play what a client said to a server; return what it answered until it hung up, or nothing more came."""
    heard = b""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(pause_s)
        for part in parts:
            try:
                sock.sendall(part)
                heard += sock.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                break
    return heard


def test_a_recorded_session_is_worth_nothing_when_played_again(serve, tapped, tmp_path):
    own = shared(tmp_path)
    served = serve(own)
    tap = tapped(served.server.port)
    assert served.ask(own, tap.endpoint) == {"taken": True}
    recorded = list(tap.seen)
    assert len(recorded) >= 3, "a greeting, a handshake and a request"
    for _ in range(3):
        replay(served.server.port, recorded)
        replay(served.server.port, [b"".join(recorded)], 0.3)
    assert served.ask(own) == {"taken": True}
    assert len(served.heard) == 2, "a replayed request was carried out"


def test_what_travels_cannot_be_read(serve, tapped, tmp_path):
    own = shared(tmp_path)
    for secured in (own, None):
        served = serve(secured)
        tap = tapped(served.server.port)
        assert served.ask(secured, tap.endpoint) == {"taken": True}
        assert (b"take" in b"".join(tap.seen)) == (secured is None)


@pytest.mark.parametrize("keyed", [True, False])
def test_a_request_sent_twice_within_its_own_connection_is_heard_once_where_there_is_a_key(
    serve, tapped, tmp_path, keyed
):
    own = shared(tmp_path) if keyed else None
    served = serve(own)
    # Only a request is that long: greeting, handshake and heartbeats are shorter.
    tap = tapped(served.server.port, twice=lambda data: len(data) > 900)
    call = served.client(own).call(tap.endpoint, "take", {"x": "y" * 1000}, 2)
    # The server ends a connection in which something comes again.
    with contextlib.suppress(BrokenError, DeadlineError):
        outcome(call)
    assert served.ask(own) == {"taken": True}
    assert len(served.heard) == (2 if keyed else 3)


def greeting(mechanism):
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + b"\0" + bytes(31)


def command(name, data=b""):
    body = bytes([len(name)]) + name + data
    return b"\x04" + bytes([len(body)]) + body if len(body) < 256 else b"\x06" + struct.pack(">Q", len(body)) + body


def frames(*parts):
    out = b""
    for i, part in enumerate(parts):
        more = int(i < len(parts) - 1)
        out += bytes([more, len(part)]) + part
    return out


READY = b"\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"


@pytest.mark.parametrize(
    "said",
    [
        [greeting(b"NULL"), command(b"READY", READY), frames(pack_request(1, "take", {}))],
        [greeting(b"PLAIN"), command(b"HELLO", b"\x05admin\x05admin"), frames(pack_request(1, "take", {}))],
        [greeting(b"CURVE"), frames(pack_request(1, "take", {}))],
        [greeting(b"CURVE"), command(b"READY", READY), frames(pack_request(1, "take", {}))],
        [greeting(b"CURVE"), command(b"HELLO", b"\x01\x00" + bytes(192)), frames(pack_request(1, "take", {}))],
        [greeting(b"CURVE"), command(b"INITIATE", bytes(249)), frames(pack_request(1, "take", {}))],
        [greeting(b"CURVE"), command(b"MESSAGE", bytes(64))],
        [greeting(b"CURVE"), b"\x06" + struct.pack(">Q", (1 << 63) - 1)],
        [b"\xff" * 4096],
        [b"GET / HTTP/1.1\r\n\r\n"],
    ],
    ids=["null", "plain", "no hello", "ready", "zero hello", "initiate", "message", "huge", "noise", "http"],
)
def test_a_stranger_that_writes_frames_of_its_own_is_not_heard(serve, tmp_path, said):
    own = shared(tmp_path)
    served = serve(own)
    heard = replay(served.server.port, said, 0.1)
    assert b"taken" not in heard
    assert served.ask(own) == {"taken": True}
    assert served.heard == [{"x": 1}]


def test_those_frames_are_heard_where_no_key_is_asked_for(serve):
    """Or the test above would prove nothing."""
    served = serve(None)
    said = [greeting(b"NULL"), command(b"READY", READY), frames(pack_request(1, "take", {}))]
    assert b"taken" in replay(served.server.port, said, 0.3)


@pytest.mark.parametrize("said", [b"", greeting(b"CURVE")], ids=["nothing", "half of it"])
def test_a_stranger_that_does_not_finish_its_handshake_is_hung_up_on(serve, tmp_path, monkeypatch, said):
    monkeypatch.setattr(control, "_HANDSHAKE_MS", 300)
    served = serve(shared(tmp_path))
    with socket.create_connection(("127.0.0.1", served.server.port)) as sock:
        sock.sendall(said)
        sock.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while sock.recv(1 << 16):
                pass


def test_closing_leaves_nothing_behind(tmp_path):
    own = shared(tmp_path)
    before = Holdings.now()
    served = Served(own)
    served.ask(own)
    with pytest.raises(BrokenError):
        served.ask(None)
    served.close()
    assert_nothing_left(before)


# -- key files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("short", 0o600, "holds 5 characters, which can be guessed"),
        ("", 0o600, "holds 0 characters"),
        (SECRET, 0o644, r"open to other users \(mode 644\); chmod 600"),
        (SECRET, 0o620, "chmod 600"),
        ("x" * 5000, 0o600, "longer than 4096 bytes"),
    ],
)
def test_a_bad_key_file_is_named_with_its_cure_and_without_its_content(tmp_path, text, mode, said):
    path = secret_file(tmp_path / "k", text, mode)
    with pytest.raises(ConfigError, match=said) as caught:
        Keys.from_shared(path, "x.key_file")
    assert "x.key_file" in str(caught.value)
    assert path in str(caught.value)
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize("path", ["/no/such/file", "/", "a\0b"])
def test_a_key_file_that_cannot_be_read_is_named_with_its_cure(path):
    with pytest.raises(ConfigError, match=r"key_file: cannot read .*openssl rand"):
        Keys.from_shared(path, "key_file")


def test_a_group_may_read_a_key_file(tmp_path):
    """As secrets are mounted for pods that do not run as root."""
    assert Keys.from_shared(secret_file(tmp_path / "k", mode=0o440), "key_file").shared


@pytest.mark.parametrize("text", [SECRET, "x" * 40 + "y", "~" * 40, ""])
def test_what_is_no_secret_key_is_refused_without_its_content(tmp_path, text):
    with pytest.raises(ConfigError, match=r"s: .* holds no CURVE secret key.*keygen") as caught:
        Keys.from_pair(secret_file(tmp_path / "k", text), [], "s", "p")
    assert not text or text not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("key", ["", "x", "~" * 40, "#" * 40, "ü" * 40])
def test_what_is_no_public_key_is_named_by_its_place(tmp_path, key):
    good = make_pair(str(tmp_path / "k"))
    with pytest.raises(ConfigError, match=r"peer_keys\[1\] is no public CURVE key"):
        Keys.from_pair(str(tmp_path / "k"), [good, key], "s", "peer_keys")


def test_a_new_key_is_private_and_replaces_none(tmp_path):
    path = tmp_path / "k"
    public = make_pair(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert zmq.curve_public(path.read_bytes().strip()).decode() == public
    with pytest.raises(ConfigError, match="name a new file"):
        make_pair(str(path))


def test_no_text_shows_a_secret(serve, tmp_path, caplog):
    caplog.set_level("DEBUG")
    own, other = shared(tmp_path), shared(tmp_path, "quite another secret")
    p, d = pairs(tmp_path, "pd")
    errors = []
    for keys_of_server, keys_of_client in ((own, other), (own, None), (p, other), (p, own), (own, d)):
        served = serve(keys_of_server)
        with pytest.raises((BrokenError, HandshakeError)) as caught:
            served.ask(keys_of_client)
        errors.append(str(caught.value))
    shown = "\n".join([*errors, caplog.text, repr(own), str(p), repr(other.client)])
    for one in (own, other, p, d):
        for pair in (one.server, one.client):
            assert pair.secret.decode() not in shown
    assert SECRET not in shown


# -- addresses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "parts"),
    [
        ("10.0.0.1:5", ("", "10.0.0.1", 5)),
        ("::1:5", ("", "::1", 5)),
        ("[::1]:5", ("", "[::1]", 5)),
        ("node_7.local:65535", ("", "node_7.local", 65535)),
        ("k:@/@y@10.0.0.1:5", ("k:@/@y", "10.0.0.1", 5)),
    ],
)
def test_an_endpoint_is_taken_apart(endpoint, parts):
    assert split(endpoint) == parts


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        ":5",
        "h",
        "h:",
        "h:0",
        "h:65536",
        "h:\u0665",
        "h:-1",
        "h:99999999999",
        "127.0.0.1:1;10.0.0.1:2",
        "a b:1",
        "a/b:1",
        "h\n:1",
    ],
)
def test_what_is_no_endpoint_is_refused(endpoint):
    with pytest.raises(ConfigError, match="host:port"):
        split(endpoint)
