"""Registration at a router: what it hears, from when, and until when."""

import contextlib
import socket
import time

import msgpack
import pytest
import zmq

pytest.importorskip("vllm", reason="connectors need vLLM")

from kvconnect import _plugin
from kvconnect.config import Config
from kvconnect.demo import model
from kvconnect.errors import ConfigError
from kvconnect.testing.engine import SHAPES, Engine


def engine(role, **options):
    _plugin.register()
    transfer = {"kv_connector": "KvConnectTcp", "kv_role": role, "kv_connector_extra_config": options}
    return Engine(str(model.ensure()), transfer, SHAPES["blocks first"], seed=0)


@pytest.fixture
def router():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as listening:
        listening.setsockopt(zmq.RCVTIMEO, 5000)
        port = listening.bind_to_random_port("tcp://127.0.0.1")
        yield listening, f"127.0.0.1:{port}"


def test_a_router_and_an_engine_of_ipv6_find_each_other():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as listening, socket.socket(socket.AF_INET6) as server:
        listening.setsockopt(zmq.IPV6, 1)
        listening.setsockopt(zmq.RCVTIMEO, 5000)
        port = listening.bind_to_random_port("tcp://[::1]")
        server.bind(("::1", 0))
        server.listen()
        http = f"[::1]:{server.getsockname()[1]}"
        with contextlib.closing(engine("kv_producer", router_discovery=f"[::1]:{port}", http_address=http)):
            assert msgpack.unpackb(listening.recv_multipart()[-1])["http_address"] == http


@pytest.mark.parametrize(("role", "kind"), [("kv_producer", "P"), ("kv_consumer", "D")])
def test_an_engine_tells_a_router_where_it_serves_from_when_it_does_until_its_end(router, role, kind):
    listening, address = router
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        http = f"127.0.0.1:{server.getsockname()[1]}"
        with contextlib.closing(engine(role, router_discovery=address, http_address=http)):
            time.sleep(0.3)
            with pytest.raises(zmq.Again):
                listening.recv_multipart(zmq.NOBLOCK)
            server.listen()
            for _ in range(2):
                told = msgpack.unpackb(listening.recv_multipart()[-1])
                assert told == {"type": kind, "http_address": http, "zmq_address": http}
        with contextlib.suppress(zmq.Again):
            while True:
                listening.recv_multipart(zmq.NOBLOCK)
        time.sleep(1.2)
        with pytest.raises(zmq.Again):
            listening.recv_multipart(zmq.NOBLOCK)


def test_a_router_that_comes_late_hears_of_an_engine_too():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        http = f"127.0.0.1:{server.getsockname()[1]}"
        with contextlib.closing(engine("kv_producer", router_discovery=address, http_address=http)):
            free.close()
            with zmq.Context() as context, context.socket(zmq.ROUTER) as listening:
                listening.setsockopt(zmq.RCVTIMEO, 8000)
                listening.bind(f"tcp://{address}")
                assert msgpack.unpackb(listening.recv_multipart()[-1])["type"] == "P"


def test_an_engine_of_both_roles_is_of_no_use_to_a_router():
    with pytest.raises(ConfigError, match="kv_role"):
        engine("kv_both", router_discovery="127.0.0.1:9", http_address="127.0.0.1:8")


def test_an_address_that_is_none_is_refused_by_the_options_name():
    with pytest.raises(ConfigError, match="router_discovery is no address: 'no such host:1'"):
        engine("kv_producer", router_discovery="no such host:1", http_address="127.0.0.1:8")


def test_a_name_that_cannot_be_one_is_as_a_server_that_does_not_listen_and_the_log_tells(router, caplog):
    listening, address = router
    caplog.set_level("DEBUG", "kvconnect.connectors.registration")
    with contextlib.closing(engine("kv_producer", router_discovery=address, http_address="x" * 300 + ":80")):
        deadline = time.monotonic() + 10
        while len(lines := [each for each in caplog.messages if "does not listen yet" in each]) < 2:
            assert time.monotonic() < deadline, "asked again and again"
            time.sleep(0.05)
    assert "label" in lines[0]
    with pytest.raises(zmq.Again):
        listening.recv_multipart(zmq.NOBLOCK)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"router_discovery": "127.0.0.1:9"}, "set both"),
        ({"http_address": "127.0.0.1:9"}, "set both"),
        ({"router_discovery": "somewhere", "http_address": "127.0.0.1:9"}, "router_discovery must"),
        ({"router_discovery": "127.0.0.1:9", "http_address": "somewhere"}, "http_address must"),
        ({"router_discovery": "127.0.0.1:9", "http_address": "127.0.0.1:99999"}, "http_address must"),
        ({"router_discovery": "127.0.0.1:0", "http_address": "127.0.0.1:9"}, "router_discovery must"),
    ],
)
def test_half_a_registration_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        Config(**options)
