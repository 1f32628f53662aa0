"""What engines cost each other: the simulation and the measurement, at sizes that take seconds."""

from __future__ import annotations

from collections import Counter
from contextlib import closing

import pytest

from bench.control.engines import Shape
from bench.control.hub import Hub
from bench.control.mesh import Mesh
from bench.control.network import Costs, Network


def _mesh(workers: int = 1, engines: int = 4) -> Mesh:
    return Mesh(Network(Costs()), engines, engines, Shape(layers=2, workers=workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_load_takes_a_claim_and_a_release_of_each_worker(workers: int) -> None:
    mesh = _mesh(workers)
    served = mesh.run(30.0, 10.0)
    mesh.network.run(mesh.network.clock.now() + 60.0)
    assert served.loaded > 200
    assert not served.missed
    asked = mesh.network.asked
    assert (asked["claim"], asked["release"]) == (served.loaded, workers * served.loaded)
    assert asked["hello"] == 16 * (1 + workers), "each pair meets once"
    # One message for each owner and third of a lease (10 s), whatever the number of loads.
    assert asked["renew"] <= 16 * 5
    assert set(asked) == {"hello", "claim", "release", "renew"}


def test_restarted_producers_are_met_again_and_nothing_is_computed_for_that() -> None:
    mesh = _mesh()
    mesh.run(20.0, 10.0)
    for producer in mesh.producers:
        producer.stop()
        producer.start()
    before = Counter(mesh.network.asked)
    served = mesh.run(20.0, 10.0)
    mesh.network.run(mesh.network.clock.now() + 5.0)
    assert served.loaded > 100
    assert not served.missed
    assert (mesh.network.asked - before)["hello"] == 2 * 16, "both ends of each pair, once"


def test_a_request_without_a_ticket_asks_every_producer() -> None:
    mesh = _mesh()
    served = mesh.run(20.0, 2.0, tickets=False)
    mesh.network.run(mesh.network.clock.now() + 5.0)
    assert served.loaded > 20
    assert mesh.network.asked["match"] == 4 * served.loaded


def test_a_consumer_remembers_no_layouts_of_producers_that_fit() -> None:
    engines = 20
    small = _mesh(workers=1, engines=engines)
    large = Mesh(Network(Costs()), engines, 1, Shape(layers=80, workers=1))
    bytes_of = [mesh.acquaint(mesh.consumers[0]) / engines for mesh in (small, large)]
    layout = 75 * 80
    assert bytes_of[1] - bytes_of[0] < 2 * layout, "that of its worker's counterpart, and no other"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("role", ["P", "D"])
def test_one_engine_among_others_serves_them_all_again_after_its_restart(role: str) -> None:
    with closing(Hub(role, 6, Shape(layers=2))) as hub:
        for _ in range(2):
            done, _ = hub.round()
            assert [one.failure for one in done] == [""] * 6
        assert hub.single(5).failure == ""
        usage = hub.usage()
        counted = usage.answered if role == "P" else usage.asked
        assert counted["claim"] == counted["release"] == 13
        hub.restart()
        done, _ = hub.round()
        assert [one.failure for one in done] == [""] * 6
