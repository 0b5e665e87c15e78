"""A job on several hosts: a gang over two of them answers as one rank; a host that is lost takes no result with it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from assets import Assets
from ray.util.placement_group import placement_group_table
from recipes import SHARED

from benchmarks.soak import soak
from benchmarks.soak_figures import NOTICED_S, Fault
from benchmarks.soak_nodes import Nodes
from mm_sglang.demo.video import render_video
from mm_sglang.parallel.placement import connect

pytestmark = pytest.mark.e2e


def test_every_host_is_lost_and_one_joins(tmp_path: Path) -> None:
    """In the middle of a prefill. `soak` raises if a result is lost or doubled, a process left, a mark missed."""
    heard: list[Fault] = []
    soak(["nodes"], tmp_path, random.Random(0), slack=SHARED, on_fault=heard.append)
    (fault,) = heard
    assert fault["noticed_s"] <= SHARED * NOTICED_S
    assert fault["waited"] == "needs 2 GPUs (0 of the cluster's 0 are free) and 2 CPUs (0 of the cluster's 0 are free)"


def test_a_gang_over_two_hosts_answers_as_one_rank(assets: Assets, tmp_path: Path) -> None:
    """Context parallelism between simulated hosts of one GPU each, with budgets that leave keys out."""
    video = render_video(tmp_path / "video.mp4", seconds=16.0, width=224, height=168).path
    config = tmp_path / "sparse.yaml"
    sparse = {"pattern": "vertical_slash", "columns": 200, "slashes": 256}
    config.write_text(yaml.safe_dump({"default": sparse, "min_tokens": 1, "guard": {"coverage": 0.9}}))
    nodes = Nodes(3, each=1)
    jobs: list[subprocess.Popen[str]] = []
    try:
        connect(nodes.address, gpus=0)
        nodes.wait()
        for gpus in (1, 2):
            command = [
                sys.executable, "-m", "mm_sglang", "job", "run", str(video), "--question", "?", "--max-tokens", "8",
                "--model", str(assets.models["qwen2_5_vl"]), "--sparse-config", str(config), "--gpus", str(gpus),
                "--address", nodes.address, "--out", str(tmp_path / f"{gpus}.jsonl"), "--max-total-tokens", "4096",
                "--chunked-prefill-size", "512",
            ]  # fmt: skip
            jobs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        hosts = most_hosts_of_a_gang(jobs)
        said = [job.communicate(timeout=60)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
        ray.shutdown()
        nodes.close()
    assert [job.returncode for job in jobs] == [0, 0], said
    assert hosts == 2
    one, two = (json.loads((tmp_path / f"{gpus}.jsonl").read_text()) for gpus in (1, 2))
    assert one["prompt_tokens"] > 4 * 512 and one["completion_tokens"] == 8
    assert two["answer"] == one["answer"] and two["tries"] == 1


def most_hosts_of_a_gang(jobs: list[subprocess.Popen[Any]]) -> int:
    """Seen while these run."""
    most, end = 0, time.monotonic() + 300
    while any(job.poll() is None for job in jobs):
        assert time.monotonic() < end
        for group in placement_group_table().values():
            bundles = group["bundles"]
            gpus = [node for n, node in group["bundles_to_node_id"].items() if bundles[n].get("GPU")]
            most = max(most, len({node for node in gpus if node}))
        time.sleep(1)
    return most
