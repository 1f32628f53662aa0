"""Whom engines serve and whom they contact, with the ends of real buffers."""

import socket

import psutil
import pytest

from kvconnect.buffers.access import Access, Contacts
from kvconnect.buffers.base import Miss, Want
from kvconnect.buffers.directory import Directory
from kvconnect.buffers.hello import Hello
from kvconnect.buffers.remote import RemoteBuffer
from kvconnect.config import Backend, Config
from kvconnect.control import ControlClient
from kvconnect.errors import BrokenError, ConfigError, KVConnectError
from kvconnect.keys import Keys, make_pair
from tests.buffers.engines import Engine, engines, eventually, group, is_miss, key

SECRET = "correct horse battery staple"  # noqa: S105 - of these tests only
ELSEWHERE = "203.0.113.7:9"  # set aside for documentation: nobody is there


def secret_file(path, text=SECRET):
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


@pytest.fixture
def key_file(tmp_path):
    return secret_file(tmp_path / "shared.key")


def pair_options(tmp_path, names="pd"):
    public = {name: make_pair(str(tmp_path / name)) for name in names}
    return [{"secret_key_file": str(tmp_path / name), "peer_keys": tuple(public.values())} for name in names]


def own_address():
    """Return an address of this host that is not loopback's, or skip."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("203.0.113.7", 9))  # sends nothing
        except OSError:
            pytest.skip("this host has loopback only")
        return sock.getsockname()[0]


def hand_over(p, d, by):
    """Move blocks from P to D, found by ticket or by content."""
    ticket = p.offer(1)
    claim = d.find("r", Want(key(1), ticket=ticket if by == "ticket" else None))
    assert not isinstance(claim, Miss), claim
    d.read(claim).wait(8)
    d.end.settle("r")
    assert p.freed() == [((1, 2, 3),)]
    assert d.block(10).tolist() == p.block(1).tolist()


# -- with the right key ---------------------------------------------------------------------


@pytest.mark.parametrize("by", ["ticket", "content"])
@pytest.mark.parametrize("pipe", ["inproc", "tcp"])
def test_engines_with_one_secret_hand_over(key_file, pipe, by):
    with engines(key_file=key_file, pipe=pipe) as (p, d):
        hand_over(p, d, by)


@pytest.mark.parametrize("by", ["ticket", "content"])
def test_engines_with_a_key_pair_each_hand_over(tmp_path, by):
    p_options, d_options = pair_options(tmp_path)
    with engines(p_options, d_options, pipe="tcp") as (p, d):
        hand_over(p, d, by)


def test_a_key_pairs_address_names_the_key_wherever_it_is_told(tmp_path):
    p_options, d_options = pair_options(tmp_path)
    with engines(p_options, d_options) as (p, _):
        public = Keys.from_pair(p_options["secret_key_file"], p_options["peer_keys"], "s", "k").name
        assert p.offer(1)["at"].startswith(f"{public}@127.0.0.1:")
        assert p.workers[0].describe()["endpoint"].startswith(f"{public}@127.0.0.1:")


def test_engines_hand_over_at_an_address_that_is_not_loopbacks(key_file):
    host = own_address()
    tcp = Backend("tcp", {"bind_host": host})
    with engines(key_file=key_file, bind_host=host, pipe=tcp) as (p, d):
        assert p.offer(9)["at"].startswith(host)
        hand_over(p, d, "ticket")


def test_the_engines_address_is_its_pipes_too(key_file):
    """Who sets `bind_host` and nothing else hands over between hosts."""
    host, process = own_address(), psutil.Process()

    def listening():
        return {at.laddr for at in process.net_connections("tcp") if at.status == psutil.CONN_LISTEN}

    before = listening()
    with engines(key_file=key_file, bind_host=host, pipe="tcp") as (p, d):
        hand_over(p, d, "ticket")
        ours = listening() - before
        assert len(ours) > 3, "of the control servers of both and their workers, and the pipe's"
        assert {at.ip for at in ours} == {host}


def test_buffers_with_one_secret_take_from_each_other_and_no_other_does(key_file, tmp_path):
    import torch

    other = secret_file(tmp_path / "other.key", "a very different secret")
    first = RemoteBuffer(Config(key_file=key_file, pipe=Backend("inproc")))
    peers = {"peers": (first.endpoint,), "pipe": Backend("inproc"), "connect_timeout_s": 2.0}
    second = RemoteBuffer(Config(key_file=key_file, **peers))
    strangers = [RemoteBuffer(Config(**peers)), RemoteBuffer(Config(key_file=other, **peers))]
    try:
        first.insert(key(1), [torch.arange(4)])
        for stranger in strangers:
            assert stranger.match([key(1)]) == 0
            assert stranger.drop_select(key(1)) is None
        assert second.match([key(1)]) == 1
        assert second.drop_select(key(1))[0].tolist() == [0, 1, 2, 3]
    finally:
        for buffer in (second, *strangers, first):
            buffer.close()


# -- without it -----------------------------------------------------------------------------


@pytest.mark.parametrize("stranger", ["no key", "another secret", "a key pair"])
@pytest.mark.parametrize("by", ["ticket", "content"])
def test_an_engine_without_the_key_gets_nothing_and_computes_itself(key_file, tmp_path, by, stranger):
    options = {
        "no key": {"key_file": None},
        "another secret": {"key_file": secret_file(tmp_path / "other.key", "a very different secret")},
        "a key pair": {"key_file": None, **pair_options(tmp_path)[0]},
    }[stranger]
    with engines(consumer=options, key_file=key_file) as (p, d):
        ticket = p.offer(1)
        answer = d.find("r", Want(key(1), ticket=ticket if by == "ticket" else None))
        assert isinstance(answer, Miss), answer
        assert answer.cause in (("unreachable", "mismatch") if by == "ticket" else ("absent",))
        assert p.end.stats()["taken"] == 0
        assert p.end.drain_released() == []


def test_an_engine_with_a_key_asks_no_engine_without(key_file):
    """It might be anybody who has bound that port."""
    with engines(consumer={"key_file": key_file}) as (p, d):
        assert is_miss(d.find("r", Want(key(1), ticket=p.offer(1))), "unreachable")
        assert p.end.stats()["taken"] == 0


def intruder_keys(kind, tmp_path):
    if kind == "none":
        return None
    return Keys.from_shared(secret_file(tmp_path / "intruder.key", "a very different secret"), "k")


@pytest.mark.parametrize("kind", ["none", "wrong"])
def test_who_speaks_the_protocol_without_the_key_can_call_nothing_at_scheduler_or_worker(key_file, tmp_path, kind):
    """Every operation of both control servers, with bodies that would be good ones."""
    with engines(key_file=key_file, pipe="tcp") as (p, d):
        ticket, worker = p.offer(1), p.workers[0].describe()
        me = Hello("evil", "0", {"model": "m", "dtype": "bfloat16"}, 1, "consumer", 30.0)
        entry = {name: ticket[name] for name in ("entry", "generation", "at", "engine", "incarnation")}
        claim = {**entry, "grant": "g", "taker": "t", "blocks": "", "part": 0}
        opening = {"pipe": "q", "name": "tcp", "message": {"tcp": 2, "checksum": True}, "hello": me.to_wire()}
        calls = [
            (ticket["at"], "hello", me.to_wire()),
            (ticket["at"], "misfit", {"engine": "E", "difference": "model"}),
            (ticket["at"], "match", {"namespace": "ns", "digest": key(1).digest.hex(), "length": 32, "taker": "t"}),
            (ticket["at"], "claim", claim),
            (ticket["at"], "release", claim),
            (ticket["at"], "renew", {"grants": [], "done": []}),
            (ticket["at"], "abandon", {"grants": []}),
            (worker["endpoint"], "pipe.open", {**opening, "worker": d.workers[0].describe()}),
            (worker["endpoint"], "pipe.ready", {"pipe": "q"}),
            (worker["endpoint"], "pipe.call", {"pipe": "q/serves", "op": "x", "body": {}}),
            (worker["endpoint"], "pipe.ping", {"pipe": "q/serves"}),
            (worker["endpoint"], "pipe.sum", {"pipe": "q", "groups": [bytes(4)], "device": "cpu"}),
            (worker["endpoint"], "pipe.close", {"pipe": "q"}),
        ]
        heard = []
        for server in (p.end._lender._server, p.workers[0]._server):
            for op, handler in list(server._handlers.items()):
                server.handle(op, lambda body, op=op, handler=handler: heard.append(op) or handler(body))
        assert {op for _, op, _ in calls} >= {*p.end._lender._server._handlers, *p.workers[0]._server._handlers}
        for at, op, body in calls:
            client = ControlClient(keys=intruder_keys(kind, tmp_path))
            with pytest.raises(BrokenError, match="or has no key"):
                client.call(at, op, body, 5).result(8)
            client.close()
        assert heard == []
        assert p.workers[0]._pipes.count == 0
        hand_over(p, d, "content")


def test_the_same_calls_are_heard_where_no_key_is_asked_for():
    """Or the test above would prove nothing."""
    with engines(pipe="tcp") as (p, _):
        ticket = p.offer(1)
        client = ControlClient()
        body = {"namespace": "ns", "digest": key(1).digest.hex(), "length": 32, "taker": "t"}
        assert "ticket" in client.call(ticket["at"], "match", body, 5).result(8)
        client.close()


# -- who listens where ----------------------------------------------------------------------


def listening(**options):
    access = Access(Config(**options))
    server, at = access.server("test")
    server.close()
    return at


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.5", "::", "somewhere"])  # noqa: S104 - it is refused
def test_an_address_that_others_reach_needs_a_key(host):
    with pytest.raises(ConfigError, match=r"bind_host is .*key_file.*insecure: true"):
        listening(bind_host=host, advertise_host="node7")


def test_so_does_the_older_field():
    with pytest.raises(ConfigError, match=r"kv_ip is '10.0.0.5'.*insecure: true"):
        listening(kv_ip="10.0.0.5", kv_rank=0)


@pytest.mark.parametrize("how", ["insecure", "key"])
def test_with_a_key_or_if_it_is_meant_it_may_be_listened_at(how, key_file):
    options = {"insecure": True} if how == "insecure" else {"key_file": key_file}
    assert listening(bind_host="0.0.0.0", advertise_host="node7", **options).startswith("node7:")  # noqa: S104


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.4.5", "localhost"])
def test_loopback_needs_nothing(host):
    assert listening(bind_host=host).startswith(host)


@pytest.mark.parametrize("role", [{"produces": True, "parts": 0}, {}], ids=["scheduler", "worker"])
def test_neither_half_of_an_engine_starts_open_to_others(role):
    with pytest.raises(ConfigError, match="bind_host"):
        Engine("E", **role, bind_host="0.0.0.0", advertise_host="node7")  # noqa: S104 - it is refused


@pytest.mark.parametrize(
    ("pipe", "path"),
    [
        (Backend("tcp", {"bind_host": "0.0.0.0", "advertise_host": "h"}), "pipe.bind_host"),  # noqa: S104
        (Backend("auto", {"options": {"tcp": {"bind_host": "10.0.0.5"}}}), "pipe.options.tcp.bind_host"),
        (Backend("nccl", {"companion": {"name": "tcp", "bind_host": "::"}}), "pipe.companion.bind_host"),
    ],
)
def test_a_pipes_own_address_is_judged_alike(pipe, path, key_file):
    with pytest.raises(ConfigError, match=rf"{path} is .*insecure: true"):
        Access(Config()).check_pipe(pipe.options)
    Access(Config(insecure=True)).check_pipe(pipe.options)
    Access(Config(key_file=key_file)).check_pipe(pipe.options)


def test_a_worker_judges_its_pipe():
    pipe = Backend("tcp", {"bind_host": "0.0.0.0", "advertise_host": "h"})  # noqa: S104 - it is refused
    with pytest.raises(ConfigError, match=r"pipe.bind_host is '0.0.0.0'"):
        Engine("D", pipe=pipe)


# -- who is contacted -----------------------------------------------------------------------


def passes(contacts, endpoint):
    try:
        contacts.check(endpoint)
    except ConfigError:
        return False
    return True


def allowed(endpoint, **options):
    return passes(Contacts(Config(group=group(), **options)), endpoint)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]", "LOCALHOST"])
def test_loopback_is_always_contacted(host):
    assert allowed(f"{host}:5")


@pytest.mark.parametrize(
    "host",
    [
        *("169.254.169.254", "10.0.0.1", "metadata.internal", "localhost.evil.example", "0.0.0.0", "2130706433"),  # noqa: S104
        *("0x7f.1", "127.1", "::ffff:10.0.0.1", "127.0.0.1.evil.example", "127.0.0.1:1;10.0.0.1", "user@10.0.0.1"),
    ],
)
def test_others_are_not_contacted_unasked(host):
    assert not allowed(f"{host}:80")


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({"peers": ("10.0.0.5:14579",)}, "10.0.0.5"),
        ({"peers": ("Node7:14579",)}, "node7"),
        ({"kv_ip": "10.0.0.5", "kv_rank": 1, "kv_parallel_size": 2}, "10.0.0.5"),
        ({"bind_host": "10.0.0.5"}, "10.0.0.5"),
        ({"advertise_host": "node7"}, "node7"),
        ({"allowed_peers": ("10.0.0.0/8",)}, "10.200.1.1"),
        ({"allowed_peers": ("fd00::/8",)}, "fd00::1"),
        ({"allowed_peers": ("10.0.0.5",)}, "10.0.0.5"),
        ({"allowed_peers": ("*.prefill.svc",)}, "p-0.prefill.svc"),
        ({"allowed_peers": ("*",)}, "anybody.example"),
    ],
)
def test_configured_hosts_are_contacted_at_any_port_and_others_still_are_not(options, host):
    assert allowed(f"{host}:5", **options)
    assert allowed(f"{host}:6", **options)
    if options.get("allowed_peers") != ("*",):
        assert not allowed("11.0.0.5:5", **options)
        assert not allowed(f"{host}.evil.example:5", **options)


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "node/7", "/"])
def test_a_malformed_network_is_named_by_its_place(entry):
    with pytest.raises(ConfigError, match=r"allowed_peers\[1\] is no network"):
        Access(Config(allowed_peers=("x", entry)))


def test_with_keys_any_address_may_be_named(key_file):
    """Who answers there has to prove itself."""
    client = Access(Config(key_file=key_file)).client("test")
    client.check(ELSEWHERE)
    client.close()


@pytest.fixture
def contacted(monkeypatch):
    """Endpoints that a control client connects to."""
    seen = []
    real = ControlClient._connect

    def connect(self, endpoint):
        peer = real(self, endpoint)
        seen.append(endpoint)
        return peer

    monkeypatch.setattr(ControlClient, "_connect", connect)
    return seen


def test_an_engine_does_not_go_where_a_ticket_sends_it(contacted):
    with engines(content_lookup=False) as (p, d):
        answer = d.find("r", Want(key(1), ticket={**p.offer(1), "at": ELSEWHERE}))
        assert is_miss(answer, "unreachable")
        assert "allowed_peers" in answer.detail
        assert ELSEWHERE not in contacted


def test_nor_where_a_met_peers_offer_or_description_sends_it(contacted):
    with engines() as (p, d):
        p.end._lender._at = ELSEWHERE
        p.offer(1)
        answer = d.find("r", Want(key(1)))
        assert isinstance(answer, Miss)
    with engines() as (p, d):
        p.end.introduce([{**p.workers[0].describe(), "endpoint": ELSEWHERE}])
        claim = d.find("r", Want(key(1), ticket=p.offer(1)))
        transfer = d.read(claim)
        with pytest.raises(KVConnectError, match="allowed_peers"):
            transfer.wait(8)
    assert ELSEWHERE not in contacted


def test_nor_is_a_pipe_opened_for_who_wants_to_be_called_elsewhere(contacted):
    with engines(pipe="tcp") as (p, d):
        me = Hello("evil", "0", {"model": "m", "dtype": "bfloat16"}, 1, "consumer", 30.0)
        worker = {**d.workers[0].describe(), "endpoint": ELSEWHERE}
        message = {"tcp": 2, "checksum": True}
        body = {"pipe": "q", "name": "tcp", "message": message, "hello": me.to_wire(), "worker": worker}
        client = ControlClient()
        with pytest.raises(ConfigError, match="allowed_peers"):
            client.call(p.workers[0].describe()["endpoint"], "pipe.open", body, 5).result(8)
        client.close()
        assert p.workers[0]._pipes.count == 0
        assert ELSEWHERE not in contacted


def test_engines_of_this_host_and_group_need_no_list():
    """The directory is this user's own: who is in it, is trusted, at the worker's end as at the scheduler's."""
    name = group()
    contacts = Contacts(Config(group=name))
    with pytest.raises(ConfigError):
        contacts.check("203.0.113.7:1")
    directory = Directory(name)
    directory.publish(Hello("P", "1", {}, 1, "producer", 30.0), "203.0.113.7:9")
    try:
        eventually(lambda: passes(contacts, "203.0.113.7:1"))
        assert passes(Contacts(Config(group=name)), "203.0.113.7:1")
        assert not passes(Contacts(Config(group=group())), "203.0.113.7:1")
        assert not passes(contacts, "203.0.113.8:9")
    finally:
        directory.close()


def test_engines_hand_over_insecurely_where_that_is_meant():
    host = own_address()
    tcp = Backend("tcp", {"bind_host": host})
    with engines({"bind_host": host}, {"bind_host": host}, insecure=True, pipe=tcp) as (p, d):
        hand_over(p, d, "content")


def test_the_key_is_in_no_description_ticket_or_configuration(key_file):
    with engines(key_file=key_file) as (p, d):
        keys = Keys.from_shared(key_file, "k")
        shown = repr([p.offer(1), p.workers[0].describe(), d.workers[0].describe(), Config(key_file=key_file)])
        for secret in (SECRET, keys.server.secret.decode(), keys.client.secret.decode()):
            assert secret not in shown


def test_no_log_line_or_error_of_a_refused_engine_shows_a_key(key_file, tmp_path, caplog):
    caplog.set_level("DEBUG")
    other = secret_file(tmp_path / "other.key", "a very different secret")
    with engines(consumer={"key_file": other}, key_file=key_file) as (p, d):
        answer = d.find("r", Want(key(1), ticket=p.offer(1)))
    shown = caplog.text + repr(answer)
    for path in (key_file, other):
        keys = Keys.from_shared(path, "k")
        for pair in (keys.server, keys.client):
            assert pair.secret.decode() not in shown
            assert pair.public.decode() not in shown
    assert SECRET not in shown
    assert "a very different secret" not in shown
    assert "will be recomputed" in caplog.text
