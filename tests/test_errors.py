"""The errors' texts and what hangs on them."""

from __future__ import annotations

import inspect
import pickle
import traceback

import pytest

from kvconnect import errors, messages
from kvconnect.errors import KVConnectError, UnavailableBackendError, UnknownBackendError, named, nearest
from tests.docs import pages

ALL = [value for _, value in inspect.getmembers(errors, inspect.isclass) if value.__module__ == errors.__name__]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_is_a_kvconnect_error_and_says_what_it_means(error):
    assert issubclass(error, KVConnectError)
    assert error.__doc__


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_says_where_it_is_explained_but_not_in_its_text(error):
    made = error("pipe", "x", "seven") if "kind" in inspect.signature(error).parameters else error("x seven")
    page, _, anchor = made.page.partition("#")
    assert anchor in pages.anchors(pages.ROOT / page)
    assert made.page not in str(made)
    assert named(made) == f"{error.__name__}: {made} ({made.page})"
    assert traceback.format_exception(made)[-1] == f"see {made.page}\n"


def test_an_error_that_was_passed_on_says_once_where_it_is_explained():
    class OfAnAuthor(errors.LoadError):
        pass

    first = errors.StaleError("too late")
    sent = messages.error_of(messages.unpack(messages.pack_error(1, first)))
    for passed in (errors.as_ours(first), pickle.loads(pickle.dumps(first)), sent):  # noqa: S301 - a test's own
        assert named(passed) == "StaleError: too late (docs/errors.md#staleerror)"
        assert "".join(traceback.format_exception(passed)).count("docs/errors.md") == 1
    assert OfAnAuthor("x").page == "docs/errors.md#loaderror"
    assert named(ValueError("seven")) == "ValueError: seven"


def test_the_nearest_name_is_found_whatever_its_case():
    known = ["KvConnect", "KvConnectTcp", "KvConnectShm"]
    assert nearest("KVConnectTCP", known) == "KvConnectTcp"
    assert nearest("kvconectshm", known) == "KvConnectShm"
    assert nearest("mooncake", known) is None
    assert nearest("x", []) is None


def test_an_unknown_backend_says_what_there_is():
    assert str(UnknownBackendError("pipe", "x", [])) == "unknown pipe 'x' (registered: none)"
    assert str(UnknownBackendError("pipe", "x", ["tcp", "shm"])) == "unknown pipe 'x' (registered: shm, tcp)"


def test_an_unavailable_backend_says_why_and_what_to_do():
    assert str(UnavailableBackendError("pipe", "x", "no GPU")) == "pipe 'x' is not available: no GPU"
    text = str(UnavailableBackendError("pipe", "x", "no cupy", "pip install cupy"))
    assert text == "pipe 'x' is not available: no cupy (pip install cupy)"


def test_a_foreign_error_becomes_the_cause_of_one_of_ours_and_ours_stay_as_they_are():
    own, foreign = errors.LoadError("gone"), ValueError("seven")
    assert errors.as_ours(own, "the pipe failed: ") is own
    made = errors.as_ours(foreign, "the pipe failed: ")
    assert (type(made), str(made), made.__cause__) == (
        errors.BrokenError,
        "the pipe failed: ValueError: seven",
        foreign,
    )
