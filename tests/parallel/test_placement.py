"""What of the cluster counts: nodes that answer, and a replica's share of its host's CPUs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from mm_sglang.parallel import placement

Cluster = Callable[..., None]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Called with (GPUs, CPUs, answers) of hosts "0", "1", ..., and with what Ray counts as free."""
    with socket.socket() as listening, socket.socket() as closed:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        closed.bind(("127.0.0.1", 0))  # and nobody listens: connections are refused

        def make(*hosts: tuple[int, int, bool], free_gpus: int = 99, free_cpus: int = 99) -> None:
            nodes = [
                {
                    "NodeID": str(number), "Alive": True, "NodeManagerAddress": "127.0.0.1",
                    "NodeManagerPort": (listening if answers else closed).getsockname()[1],
                    "Resources": {"GPU": float(gpus), "CPU": float(cpus)},
                }
                for number, (gpus, cpus, answers) in enumerate(hosts)
            ]  # fmt: skip
            monkeypatch.setattr(ray, "nodes", lambda: nodes)
            free = {"GPU": float(free_gpus), "CPU": float(free_cpus)}
            monkeypatch.setattr(ray, "available_resources", lambda: free)

        yield make


def test_a_node_that_takes_no_connection_is_lost(cluster: Cluster) -> None:
    cluster((2, 2, True), (2, 2, False))
    assert placement.lost_nodes(["0", "1", "2"]) == {"1", "2"}
    assert placement.lost_nodes([]) == set()
    assert set(placement.answering()) == {"0"}


@pytest.mark.parametrize(
    ("hosts", "gpus", "replicas", "free", "cpus"),
    [
        ([(4, 16, True)], 2, 1, 99, 8),  # half of the host, and no more than eight
        ([(8, 16, True)], 2, 4, 99, 4),
        ([(8, 16, True)], 2, 4, 8, 2),  # somebody else has the rest
        ([(4, 16, True), (4, 4, True)], 2, 1, 99, 2),  # fits either host
        ([(4, 16, True), (4, 4, False)], 2, 1, 99, 8),
        ([(4, 0, True), (0, 6, True)], 2, 2, 6, 3),  # CPUs are on hosts of their own
        ([(2, 2, True), (2, 2, True)], 4, 1, 4, 4),  # the gang spans hosts
        ([(2, 2, True)], 2, 1, 0, 0),
    ],
)
def test_decoders_get_their_gpus_share(
    cluster: Cluster, hosts: list[tuple[int, int, bool]], gpus: int, replicas: int, free: int, cpus: int
) -> None:
    cluster(*hosts, free_cpus=free)
    assert placement.decoder_cpus(gpus, replicas) == cpus


@pytest.mark.parametrize(
    ("free", "strategy"),
    [
        ([(1, 2), (1, 2)], "PACK"),  # each host has a GPU that somebody else uses
        ([(1, 2), (2, 2)], "STRICT_PACK"),
        ([(2, 0), (2, 1)], "PACK"),
        ([(2, 2), (0, 0)], "STRICT_PACK"),
    ],
)
def test_a_gang_stays_inside_a_host_that_has_room_now(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, free: list[tuple[int, int]], strategy: str
) -> None:
    cluster((2, 2, True), (2, 2, True), (2, 2, False))
    counted = [*free, (2, 2)]  # Ray still counts the host that is gone
    left = {str(number): {"GPU": float(gpus), "CPU": float(cpus)} for number, (gpus, cpus) in enumerate(counted)}
    monkeypatch.setattr(ray._private.state, "available_resources_per_node", lambda: left)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(placement, "placement_group", lambda bundles, **options: asked.update(options, bundles=bundles))
    placement.place(2, 2, "x")
    assert asked["strategy"] == strategy and len(asked["bundles"]) == 4


def test_what_is_missing_is_counted_on_nodes_that_answer(cluster: Cluster) -> None:
    group: Any = SimpleNamespace(bundle_specs=[{"GPU": 1.0}, {"GPU": 1.0}, {"CPU": 1.0}])
    cluster((2, 2, True), (2, 2, False), free_gpus=4, free_cpus=0)
    assert placement.no_place(group) == (
        "needs 2 GPUs (2 of the cluster's 2 are free) and 1 CPUs (0 of the cluster's 2 are free)"
    )
    cluster((2, 2, False), free_gpus=2)
    assert "2 GPUs (0 of the cluster's 0 are free)" in placement.no_place(group)


def test_nothing_is_missing_where_ray_is_only_slow(cluster: Cluster) -> None:
    group: Any = SimpleNamespace(bundle_specs=[{"GPU": 1.0}, {"CPU": 1.0}])
    cluster((2, 2, True), free_gpus=1, free_cpus=1)
    assert placement.no_place(group) == ""
