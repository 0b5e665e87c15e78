"""Where a job's processes run: the Ray cluster, a placement group of one-GPU bundles, and their certain end."""

from __future__ import annotations

import signal
import socket
import warnings
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

REACH_S = 3.0  # a cluster's head answers within this, or is not there
REAP_S = 10.0
PROBE_S = 1.0  # a node of the cluster takes a connection within this, or is lost
MOST_DECODERS = 8  # of a replica


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a gang, as its heartbeat names it."""

    pid: int
    created: float
    node: str


def connect(address: str, *, gpus: int) -> None:
    """Join the cluster at `address`, or start a Ray of this machine's own with so many GPUs if it is "local".

    Raises:
        ValueError: nothing answers there.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address == "local":
        with warnings.catch_warnings():  # of what a later Ray will do with actors that have no GPU
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(address="local", num_gpus=gpus, include_dashboard=False, **quiet)
        return
    if address != "auto":
        _require_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"--address {address}: no Ray cluster there ({' '.join(str(error).split())[:200]})") from error


def _require_reachable(address: str) -> None:
    """Ray itself tries for a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ValueError(f"--address {address}: needs host:port of a Ray cluster's head, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--address {address}: no Ray cluster there ({error})") from error


def cluster_gpus() -> int:
    """All of them, also those in use."""
    return int(ray.cluster_resources().get("GPU", 0))


def decoder_cpus(gpus: int, replicas: int) -> int:
    """CPUs for each replica's decoders: its GPUs' share of its host's, if they are free. With 0, where all are taken,
    SGLang decodes by itself."""
    hosts = [host for host in answering().values() if host.get("GPU", 0) >= gpus]
    shares = [int(host.get("CPU", 0) // (host["GPU"] // gpus)) for host in hosts]
    free = int(ray.available_resources().get("CPU", 0)) // replicas
    return min(MOST_DECODERS, free, min(shares, default=0) or free)


def require_gpus(replicas: int, gpus: int, has: int) -> None:
    """ValueError if `has` are fewer GPUs than replicas of `gpus` ranks need."""
    if replicas * gpus > has:
        raise ValueError(f"--replicas {replicas} x --gpus {gpus}: needs {replicas * gpus} GPUs, the cluster has {has}")


def host_for_messages() -> str:
    """Loopback if every node is this machine, else its address in the cluster."""
    here = ray.util.get_node_ip_address()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeManagerAddress"] != here]
    return str(here) if others else "127.0.0.1"


def place(gpus: int, cpus: int, name: str) -> PlacementGroup:
    """One-GPU bundles, then one-CPU bundles, inside one host if one has that many of both free, else over several.

    Counted by what is free: a host whose GPUs somebody else has would be waited for, though others have enough.
    """
    there = answering()
    free = [host for node, host in _free().items() if node in there]
    fits = any(host.get("GPU", 0) >= gpus and host.get("CPU", 0) >= cpus for host in free)
    bundles = [{"GPU": 1.0}] * gpus + [{"CPU": 1.0}] * cpus
    return placement_group(bundles, strategy="STRICT_PACK" if fits else "PACK", name=name)


def _free() -> dict[str, dict[str, float]]:
    """What each node has to give away."""
    from ray._private.state import available_resources_per_node  # Ray's public function adds the nodes up

    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free


def no_place(group: PlacementGroup) -> str:
    """What is missing for a group that is still waiting; nothing where enough is free and Ray is only slow."""
    hosts, free = answering().values(), ray.available_resources()
    missing, short = [], False
    for kind in ("GPU", "CPU"):
        if needs := sum(int(bundle.get(kind, 0)) for bundle in group.bundle_specs):
            has = int(sum(host.get(kind, 0) for host in hosts))
            left = min(int(free.get(kind, 0)), has)
            short |= left < needs
            missing.append(f"{needs} {kind}s ({left} of the cluster's {has} are free)")
    return f"needs {' and '.join(missing)}" if short else ""


def nodes_of(group: PlacementGroup) -> set[str]:
    """Where its bundles are; of a group that has its place."""
    return set(placement_group_table(group)["bundles_to_node_id"].values())


def lost_nodes(nodes: Iterable[str]) -> set[str]:
    """Those that Ray has given up, or that do not answer."""
    wanted = set(nodes)
    return wanted - set(answering(wanted)) if wanted else wanted


def answering(only: Collection[str] | None = None) -> dict[str, dict[str, float]]:
    """Resources of the nodes that take a connection: Ray goes on to count one that is gone for some fifteen seconds.

    Args:
        only: look at these nodes.
    """
    alive = [node for node in ray.nodes() if node["Alive"] and (only is None or node["NodeID"] in only)]
    with ThreadPoolExecutor(max_workers=max(len(alive), 1)) as pool:
        answers = list(pool.map(_answers, alive))
    return {node["NodeID"]: node["Resources"] for node, answer in zip(alive, answers, strict=True) if answer}


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def reap(processes: Iterable[Process]) -> None:
    """SIGKILL these processes and their children on whichever node they are; ray.kill cannot end a stopped one."""
    by_node: dict[str, list[Process]] = {}
    for process in processes:
        by_node.setdefault(process.node, []).append(process)
    kill_all(by_node.pop(ray.get_runtime_context().get_node_id(), []))
    lost = lost_nodes(by_node)  # they took their processes along
    remote = ray.remote(num_cpus=0, max_retries=0)(kill_all)
    waiting = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(those)
        for node, those in by_node.items()
        if node not in lost
    ]
    ray.wait(waiting, num_returns=len(waiting), timeout=REAP_S) if waiting else None


def kill_all(processes: list[Process]) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            found = psutil.Process(process.pid)
            if found.create_time() == process.created:
                for each in [*found.children(recursive=True), found]:
                    with suppress(psutil.Error):
                        each.send_signal(signal.SIGKILL)
