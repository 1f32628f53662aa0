"""What the proxy accepts as servers and limits."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from kvconnect.errors import ConfigError
from kvconnect.proxy.main import parser
from kvconnect.proxy.settings import Settings


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("127.0.0.1:8100", "http://127.0.0.1:8100"),
        ("http://host:8100/", "http://host:8100"),
        ("https://host", "https://host"),
        ("http://[::1]:8100", "http://[::1]:8100"),
    ],
)
def test_a_server_is_a_base_url_or_host_and_port(given, used):
    assert Settings(prefill=(given,)).prefill == (used,)


@pytest.mark.parametrize(
    "url", ["", "ftp://h:1", "http://", "http://h:99999", "http://h:x", "http://h:1/v1", "h:1?q=1"]
)
def test_anything_else_is_refused_with_the_option_and_the_cure(url):
    with pytest.raises(ConfigError, match=r"--decode must look like 'http://host:port'"):
        Settings(decode=(url,))


@pytest.mark.parametrize("url", ["http://user:secret@h:1", "user:secret@h:1", "http://secret@h", "http://u:secret@h:x"])
def test_a_user_or_password_in_a_url_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="leave out the user and password") as caught:
        Settings(decode=(url,))
    assert "secret" not in str(caught.value)


def test_each_leg_needs_a_server():
    with pytest.raises(ConfigError, match=r"at least one prefill server \(--prefill URL\)"):
        Settings(prefill=())


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
@pytest.mark.parametrize("name", [field.name for field in fields(Settings) if field.name.endswith("_s")])
def test_every_time_is_positive_and_finite(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be greater than 0 and finite, got {value}"):
        Settings(**{name: value})


@pytest.mark.parametrize("field", [each for each in fields(Settings) if each.type == "int"], ids=lambda each: each.name)
def test_every_number_has_a_least_value(field):
    with pytest.raises(ConfigError, match=f"{field.name} must be at least [01], got -1"):
        Settings(**{field.name: -1})


def test_a_policy_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"prefill_policy must be one of round_robin, .*, got 'random'"):
        Settings(prefill_policy="random")


def test_a_server_that_is_named_twice_is_refused():
    with pytest.raises(ConfigError, match="--decode names http://h:1 twice"):
        Settings(decode=("h:1", "http://h:1/"))


def test_every_setting_is_an_option_of_the_command_line_with_the_same_default():
    options = vars(parser().parse_args([]))
    for field in fields(Settings):
        assert options[field.name] in (None, field.default)
    options = vars(
        parser().parse_args(["--retries", "0", "--health-interval", "0.5", "--decode-policy", "least_loaded"])
    )
    assert (options["retries"], options["health_interval_s"], options["decode_policy"]) == (0, 0.5, "least_loaded")
