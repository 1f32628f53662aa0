"""Engines of one host finding each other, and the old fields' address rules."""

import os
import subprocess
import sys

import msgpack
import pytest

from kvconnect.buffers.address import advertised, fixed_producers, listen_address
from kvconnect.buffers.directory import Directory, Producers
from kvconnect.buffers.hello import Hello
from kvconnect.config import Config
from kvconnect.errors import ConfigError


def hello(name="P"):
    return Hello(name, f"inc-{name}", {}, 1, "producer", 30.0)


@pytest.fixture
def base(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path / "kvconnect"


def test_a_producer_is_found_until_it_closes(base):
    ours, theirs = Directory("g", base), Directory("g", base)
    theirs.publish(hello(), "127.0.0.1:7")
    assert ours.scan() == ("127.0.0.1:7",)
    theirs.close()
    theirs.close()
    assert ours.scan() == ()
    assert not any(ours.path.iterdir())


def test_our_own_entry_is_not_a_peer(base):
    directory = Directory("g", base)
    directory.publish(hello(), "127.0.0.1:7")
    assert directory.scan() == ()


def test_groups_do_not_see_each_other(base):
    Directory("a", base).publish(hello(), "127.0.0.1:7")
    assert Directory("b", base).scan() == ()


@pytest.mark.parametrize("group", ["../x", "a/b", ".", "..", "", "ü", "x" * 300])
def test_any_text_is_a_group_and_none_leaves_the_directory(base, group):
    directory = Directory(group, base)
    assert directory.path.parent == base
    assert directory.usable


def test_a_dead_producers_file_is_ignored_and_removed(base):
    directory = Directory("g", base)
    code = (
        "import sys; from pathlib import Path; from kvconnect.buffers.directory import Directory;"
        "from kvconnect.buffers.hello import Hello;"
        "Directory('g', Path(sys.argv[1])).publish(Hello('P', 'i', {}, 1, 'producer', 1.0), '127.0.0.1:7')"
    )
    subprocess.run([sys.executable, "-c", code, str(base)], check=True, timeout=50)
    assert any(directory.path.iterdir())
    assert directory.scan() == ()
    assert not any(directory.path.iterdir())


def test_a_reused_pid_is_not_the_producer(base):
    directory, other = Directory("g", base), Directory("g", base)
    other.publish(hello(), "127.0.0.1:7")
    (path,) = directory.path.iterdir()
    path.write_bytes(msgpack.packb({**msgpack.unpackb(path.read_bytes()), "started": 1}))
    assert directory.scan() == ()


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x01", msgpack.packb({"endpoint": 5}), b"x" * 100_000])
def test_a_file_that_is_no_entry_is_ignored(base, content):
    directory = Directory("g", base)
    (directory.path / "1-x").write_bytes(content)
    assert directory.scan() == ()


@pytest.mark.parametrize("spoil", ["mode", "link", "file"])
def test_a_directory_that_is_not_private_is_not_used(base, spoil, caplog):
    elsewhere = base.parent / "elsewhere"
    if spoil == "mode":
        base.mkdir()
        base.chmod(0o777)
    elif spoil == "link":
        elsewhere.mkdir(mode=0o700)
        base.symlink_to(elsewhere)
    else:
        base.write_text("")
    directory = Directory("g", base)
    assert not directory.usable
    directory.publish(hello(), "127.0.0.1:7")
    assert directory.scan() == ()
    assert "cannot find each other" in caplog.text
    assert not Producers([], directory).any()


def test_a_new_producer_is_noticed_without_scanning_again_and_again(base):
    directory = Directory("g", base)
    producers = Producers([], directory, "me")
    os.utime(directory.path, (1, 1))
    assert producers.endpoints() == ()
    assert not producers.any()
    Directory("g", base).publish(hello(), "127.0.0.1:7")
    assert producers.any()
    assert producers.endpoints() == ("127.0.0.1:7",)


def test_fixed_producers_come_first_and_never_ourselves(base):
    directory = Directory("g", base)
    Directory("g", base).publish(hello(), "127.0.0.1:7")
    producers = Producers(["h:1", "me:2", "h:1"], directory, "me:2")
    assert producers.endpoints() == ("h:1", "127.0.0.1:7")


# -- addresses ------------------------------------------------------------------------------


def test_on_one_host_the_old_fields_need_no_ports():
    options = Config(kv_ip="127.0.0.1", kv_port=14579, kv_rank=1, kv_parallel_size=2)
    assert listen_address(options) == ("127.0.0.1", 0)
    assert fixed_producers(options) == []


def test_across_hosts_rank_r_listens_at_kv_port_plus_r():
    options = Config(kv_ip="10.0.0.5", kv_port=20000, kv_rank=1, kv_parallel_size=3, peers=("x:1",))
    assert listen_address(options) == ("10.0.0.5", 20001)
    assert fixed_producers(options) == ["x:1", "10.0.0.5:20000", "10.0.0.5:20002"]


def test_peers_are_told_an_address_that_they_can_use():
    assert advertised(Config(advertise_host="node7"), "::", 5) == "node7:5"
    assert advertised(Config(), "127.0.0.1", 5) == "127.0.0.1:5"
    with pytest.raises(ConfigError, match="advertise_host"):
        advertised(Config(), "::", 5)
