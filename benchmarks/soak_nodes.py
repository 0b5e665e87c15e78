"""Ray's simulated cluster for the soak: hosts that can be lost as a power cut loses them, and new ones that join."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from mm_sglang.parallel.placement import cluster_gpus

JOINED_S = 60.0


class Nodes:
    """A head, where the job's driver is, and `count` hosts of `each` GPUs and CPUs; 0 gives one's to the head."""

    def __init__(self, count: int, each: int = 2) -> None:
        self.wanted, self.each = count, each
        on_head = 0 if count else each
        has = {"num_cpus": on_head, "num_gpus": on_head}
        self.cluster = Cluster(initialize_head=True, head_node_args=has | {"include_dashboard": False})
        for _ in range(count):
            self.join()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @property
    def count(self) -> int:
        return len(self.cluster.worker_nodes)

    def join(self) -> None:
        self.cluster.add_node(wait=False, num_gpus=self.each, num_cpus=self.each)

    def wait(self) -> None:
        """Until Ray, which has to be connected, knows them all."""
        end = time.monotonic() + JOINED_S
        while cluster_gpus() < self.each * max(self.count, 1):
            assert time.monotonic() < end, f"{cluster_gpus()} GPUs after {JOINED_S} s"
            time.sleep(0.1)

    def lose(self, node_ids: set[str]) -> None:
        """SIGKILL to everything that runs there: nobody says goodbye to anybody."""
        for node in [each for each in self.cluster.worker_nodes if each.node_id in node_ids]:
            there = _all_processes(node)
            for process in there:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            self.cluster.remove_node(node, allow_graceful=False)

    def lose_all(self) -> None:
        self.lose({node.node_id for node in self.cluster.worker_nodes})

    def close(self) -> None:
        self.cluster.shutdown()


def _all_processes(node: Any) -> list[psutil.Process]:
    found = []
    for infos in node.all_processes.values():
        for info in infos:
            with suppress(psutil.Error):
                process = psutil.Process(info.process.pid)
                found += [process, *process.children(recursive=True)]
    return found
