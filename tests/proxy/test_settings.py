"""What the proxy accepts as servers and limits."""

from __future__ import annotations

import pytest

from kvconnect.errors import ConfigError
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


@pytest.mark.parametrize("name", ["connect", "prefill", "decode", "client", "health"])
def test_every_time_limit_is_positive(name):
    with pytest.raises(ConfigError, match=f"{name}_timeout_s must be greater than 0, got 0"):
        Settings(**{f"{name}_timeout_s": 0})
