"""`Transfer`: who is told of its end."""

import pytest

from kvconnect.pipes.base import Transfer


def test_a_callback_that_raises_keeps_no_other_from_hearing(caplog: pytest.LogCaptureFixture) -> None:
    transfer, heard = Transfer(1), []

    def fail(_: Transfer) -> None:
        raise RuntimeError("mistake")

    transfer.add_done_callback(fail)
    transfer.add_done_callback(heard.append)
    transfer.finish()
    assert heard == [transfer]
    assert "a callback of a transfer failed" in caplog.text
