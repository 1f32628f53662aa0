"""What is concluded from measured copies."""

from __future__ import annotations

import pytest

from kvconnect.cuda.costs import Costs, fit


def test_two_measurements_tell_what_a_launch_costs_beside_its_bytes() -> None:
    start_s, rate = 20e-6, 1.9e12
    found = fit(lambda nbytes: start_s + nbytes / rate, 32 << 20)
    assert found == pytest.approx((rate, start_s))
    assert Costs(*found, 2e12, 5e-6).kernel_s(1 << 30) == pytest.approx(start_s + (1 << 30) / rate)


@pytest.mark.parametrize(("part_s", "whole_s"), [(2e-5, 2e-4), (2e-5, 2e-5), (3e-5, 2e-5)])
def test_measurements_that_do_not_fit_a_line_count_as_bytes_only(part_s: float, whole_s: float) -> None:
    """Noise, or a part that lies in a cache."""
    assert fit(lambda nbytes: whole_s if nbytes == 400 else part_s, 400) == (400 / whole_s, 0)


def test_an_engine_is_faster_where_runs_are_long_enough_to_be_told_of() -> None:
    costs = Costs(kernel_rate=360e9, kernel_start_s=1e-5, engine_rate=390e9, engine_call_s=5e-6)
    assert not costs.engine_is_faster(2 << 20)
    assert costs.engine_is_faster(64 << 20)
