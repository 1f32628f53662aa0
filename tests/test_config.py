"""The only parser of ``kv_connector_extra_config``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import pytest

from kvconnect.config import Backend, Config, parse_backend, parse_options
from kvconnect.errors import ConfigError

ROOT = "kv_connector_extra_config"


def test_nothing_is_required():
    assert Config.parse({}) == Config()


def test_every_key_is_read():
    extra = {
        "pipe": "tcp",
        "buffer": {"name": "remote", "depth": 3},
        "bind_host": "0.0.0.0",  # noqa: S104
        "advertise_host": "10.0.0.1",
        "port": 5600,
        "peers": ["10.0.0.2:5600", "[::1]:5601"],
        "group": "g",
        "lease_s": 3,
        "connect_timeout_s": 1,
        "lookup_timeout_s": 0.5,
        "transfer_timeout_s": 6,
        "release_timeout_s": 7.5,
        "unasked_share": 0,
        "content_lookup": False,
        "kv_ip": "10.0.0.1",
        "kv_port": 14579,
        "kv_rank": 1,
        "kv_parallel_size": 2,
    }
    config = Config.parse(extra)
    assert config.pipe == Backend("tcp")
    assert config.buffer == Backend("remote", {"depth": 3})
    assert config.peers == ("10.0.0.2:5600", "[::1]:5601")
    assert config.lease_s == 3.0
    assert isinstance(config.lease_s, float)
    assert {name: getattr(config, name) for name in extra if name not in ("pipe", "buffer", "peers")} == {
        name: value for name, value in extra.items() if name not in ("pipe", "buffer", "peers")
    }


@pytest.mark.parametrize("key", Config.__dataclass_fields__)
def test_every_key_is_documented(key):
    text = Config.__doc__ or ""
    assert re.search(rf"\b{key}\b[^:\n]*:", text), f"Config's docstring does not explain {key}"


def test_an_unknown_key_is_named_with_its_path_and_the_nearest():
    with pytest.raises(ConfigError) as caught:
        Config.parse({"leese_s": 3})
    assert str(caught.value) == f"{ROOT}.leese_s is not a known option; did you mean 'lease_s'?"


def test_an_unknown_key_near_none_lists_the_known():
    with pytest.raises(
        ConfigError, match=r"xyzzy is not a known option; known keys: advertise_host, allowed_peers, bind_host, "
    ):
        Config.parse({"xyzzy": 1})


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ({"port": "5600"}, f"{ROOT}.port must be a whole number, got '5600'"),
        ({"port": True}, f"{ROOT}.port must be a whole number, got True"),
        ({"port": 1.0}, f"{ROOT}.port must be a whole number, got 1.0"),
        ({"port": None}, f"{ROOT}.port must be a whole number, got None"),
        ({"lease_s": "30"}, f"{ROOT}.lease_s must be a number, got '30'"),
        ({"lease_s": True}, f"{ROOT}.lease_s must be a number, got True"),
        ({"group": 7}, f"{ROOT}.group must be a string, got 7"),
        ({"content_lookup": 1}, f"{ROOT}.content_lookup must be true or false, got 1"),
        ({"peers": "h:1"}, f"{ROOT}.peers must be a list, got 'h:1'"),
        ({"peers": [1]}, f"{ROOT}.peers[0] must be a string, got 1"),
        ({"peers": ["h:1", "h"]}, f"{ROOT}.peers[1] must look like 'host:port', got 'h'"),
        ({"peers": [":1"]}, f"{ROOT}.peers[0] must look like 'host:port', got ':1'"),
        ({"peers": [""]}, f"{ROOT}.peers[0] must look like 'host:port', got ''"),
        ({"peers": ["h:x"]}, f"{ROOT}.peers[0] must look like 'host:port', got 'h:x'"),
        ({"pipe": 7}, f"{ROOT}.pipe must be a name or an object with a 'name', got 7"),
        ({"pipe": ""}, f"{ROOT}.pipe must be a name or an object with a 'name', got ''"),
        ({"pipe": {"nom": "tcp"}}, f"{ROOT}.pipe must be a name or an object with a 'name', got {{'nom': 'tcp'}}"),
        ({"port": 65536}, f"{ROOT}.port must be a TCP port (0 to 65535), got 65536"),
        ({"kv_port": -1}, f"{ROOT}.kv_port must be a TCP port (0 to 65535), got -1"),
        ({"lease_s": 0}, f"{ROOT}.lease_s must be greater than 0 and at most 1000000 (s), got 0.0"),
        (
            {"transfer_timeout_s": -1},
            f"{ROOT}.transfer_timeout_s must be greater than 0 and at most 1000000 (s), got -1.0",
        ),
        ({"pipe_idle_s": 1e9}, f"{ROOT}.pipe_idle_s must be greater than 0 and at most 1000000 (s), got 1000000000.0"),
        ({"lease_s": float("nan")}, f"{ROOT}.lease_s must be a finite number, got nan"),
        ({"lease_s": 10**400}, f"{ROOT}.lease_s must be a finite number, got {10**400}"),
        ({"unasked_share": 1.5}, f"{ROOT}.unasked_share must be between 0 and 1, got 1.5"),
        (
            {"kv_rank": 2, "kv_parallel_size": 2},
            f"{ROOT}.kv_rank is 2, but ranks run from 0 to kv_parallel_size - 1 = 1",
        ),
    ],
)
def test_a_wrong_value_fails_with_path_and_cure(extra, complaint):
    with pytest.raises(ConfigError) as caught:
        Config.parse(extra)
    assert str(caught.value) == complaint


def test_optional_values_may_be_null():
    config = Config.parse({"advertise_host": None, "kv_rank": None, "pipe_idle_s": None})
    assert (config.advertise_host, config.kv_rank, config.pipe_idle_s) == (None, None, None)


def test_the_parsed_configuration_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().port = 7  # type: ignore[misc]


def test_a_bare_name_is_short_for_an_object_with_that_name():
    assert parse_backend("x", "tcp") == parse_backend("x", {"name": "tcp"}) == Backend("tcp")


@dataclass(frozen=True)
class Options:
    """Options as a backend has them."""

    mode: Literal["fast", "safe"] = "fast"
    depth: int = 2
    hosts: tuple[str, ...] = ()


def test_a_backends_options_are_parsed_by_the_same_rules():
    assert parse_options(Options, {"mode": "safe", "hosts": ["a"]}, "pipe") == Options("safe", 2, ("a",))
    with pytest.raises(ConfigError, match=r"pipe\.mode must be one of 'fast', 'safe', got 'fats'"):
        parse_options(Options, {"mode": "fats"}, "pipe")
    with pytest.raises(ConfigError, match=r"pipe\.dept is not a known option; did you mean 'depth'\?"):
        parse_options(Options, {"dept": 1}, "pipe")


# -- access ---------------------------------------------------------------------------------


def test_a_shared_secret_and_a_key_pair_exclude_each_other():
    with pytest.raises(ConfigError, match=r"key_file and .*secret_key_file exclude each other: remove one"):
        Config.parse({"key_file": "/a", "secret_key_file": "/b", "peer_keys": ["x"]})


@pytest.mark.parametrize(
    "extra", [{"secret_key_file": "/a"}, {"peer_keys": ["x"]}, {"peer_keys": ["x"], "key_file": "/a"}]
)
def test_a_key_pair_and_the_keys_of_others_belong_together(extra):
    with pytest.raises(ConfigError, match="belong together: set both or none"):
        Config.parse(extra)
