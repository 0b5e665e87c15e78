"""Two jobs at once on a cluster of several hosts, through RAY_ADDRESS and --address: one with two replicas, one with a
gang over two hosts. Every input once, the same answers, and the jobs don't meet."""

from __future__ import annotations

import json
import os
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
from ray_head import Talk

from benchmarks.soak_nodes import Nodes
from mm_sglang.demo.video import render_video
from mm_sglang.parallel.placement import connect

pytestmark = pytest.mark.e2e
VIDEOS = 4
MINUTES = 60


def test_two_jobs_on_hosts_of_one_gpu_each(assets: Assets, tmp_path: Path) -> None:
    """Simulated hosts, a video in several chunks, budgets that leave keys out."""
    whole = render_video(tmp_path / "video.mp4", seconds=16.0, width=224, height=168).path.read_bytes()
    videos = [tmp_path / f"{number}.mp4" for number in range(VIDEOS)]
    for number, video in enumerate(videos):
        video.write_bytes(whole + bytes([number]))  # they differ in a last byte, which no decoder reads
    config = tmp_path / "sparse.yaml"
    sparse = {"pattern": "vertical_slash", "columns": 200, "slashes": 256}
    config.write_text(yaml.safe_dump({"default": sparse, "min_tokens": 1, "guard": {"coverage": 0.9}}))
    nodes = Nodes(4, each=1)
    outs = {"replicas": tmp_path / "replicas.jsonl", "gang": tmp_path / "gang.jsonl"}
    options = {"replicas": ("--replicas", "2"), "gang": ("--gpus", "2", "--address", nodes.address)}
    jobs: dict[str, subprocess.Popen[str]] = {}
    try:
        connect(nodes.address, gpus=0)
        nodes.wait()
        for name, out in outs.items():
            command = [
                sys.executable, "-m", "mm_sglang", "job", "run", *map(str, videos), "--question", "?",
                "--max-tokens", "8", "--model", str(assets.models["qwen2_5_vl"]), "--sparse-config", str(config),
                "--out", str(out), "--max-total-tokens", "4096", "--chunked-prefill-size", "512", *options[name],
            ]  # fmt: skip
            environment = os.environ | ({"RAY_ADDRESS": nodes.address} if name == "replicas" else {})
            jobs[name] = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        talk = Talk()
        hosts = most_hosts_of_a_gang(jobs, talk, {str(out): f"driver of {name}" for name, out in outs.items()})
        said = [job.communicate(timeout=60)[0] for job in jobs.values()]
    finally:
        for job in jobs.values():
            job.kill()
        ray.shutdown()
        nodes.close()
    assert [job.returncode for job in jobs.values()] == [0, 0] and "failed" not in "".join(said), said
    assert hosts == 2
    found = {name: [json.loads(line) for line in out.read_text().splitlines()] for name, out in outs.items()}
    for lines in found.values():
        assert len(lines) == VIDEOS == len({line["key"] for line in lines})
        assert all(line["prompt_tokens"] > 4 * 512 and line["completion_tokens"] == 8 for line in lines)
        assert all(line["tries"] == 1 for line in lines)
    assert {line["replica"] for line in found["replicas"]} == {0, 1}
    assert len({line["answer"] for lines in found.values() for line in lines}) == 1  # of one video, on one rank and two
    talk.require_apart("driver of replicas", "driver of gang")


def most_hosts_of_a_gang(jobs: dict[str, subprocess.Popen[str]], talk: Talk, drivers: dict[str, str]) -> int:
    """Seen while these run; who talks to whom is looked at, too."""
    most, end = 0, time.monotonic() + 8 * MINUTES
    while any(job.poll() is None for job in jobs.values()):
        assert time.monotonic() < end
        for group in placement_group_table().values():
            bundles: dict[int, Any] = group["bundles"]
            gpus = [node for n, node in group["bundles_to_node_id"].items() if bundles[n].get("GPU")]
            most = max(most, len({node for node in gpus if node}))
        talk.look(drivers)
        time.sleep(2)
    return most
