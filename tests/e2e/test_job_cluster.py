"""Jobs on a cluster that is there already, through `ray job submit`; test_job_nodes.py has those without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from assets import Assets
from ray_head import JOB_SERVER, Head, Talk, ray_head

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not JOB_SERVER, reason="`ray job submit` needs ray[default]"),
]
MINUTES = 60
VIDEOS = 4
FLAGS = ("--max-tokens", "4", "--max-total-tokens", "4096")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head") / "log", gpus=3) as head:
        yield head


@pytest.fixture(scope="module")
def folder(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with videos that differ in a last byte, which no decoder reads."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "videos").mkdir()
    for number in range(VIDEOS):
        content = (assets.folder / "tall.mp4").read_bytes() + bytes([number])
        (folder / "videos" / f"{number}.mp4").write_bytes(content)
    shutil.copytree(assets.models["qwen2_5_vl"], folder / "model")
    return folder


def run_command(out: Path | str, *options: str) -> list[str]:
    videos = [f"videos/{number}.mp4" for number in range(VIDEOS)]
    return ["mm-sglang", "job", "run", *videos, "--model", "model", "--question", "?", "--out", str(out), *options]


def submitted(head: Head, *command: str) -> list[str]:
    program = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", head.server]
    return [*program, "--working-dir", "videos/..", "--", *command]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_jobs_on_one_cluster(head: Head, folder: Path, tmp_path: Path) -> None:
    """One with two replicas, one submitted with a working directory: every input once, and they don't meet."""
    outs = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    first = run_command(outs[0], "--replicas", "2", *FLAGS)
    second = submitted(head, *run_command(outs[1], *FLAGS))
    environment = head.environment | {"RAY_ADDRESS": head.address}
    jobs = [
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in (first, second)
    ]
    talk, end = Talk(), time.monotonic() + 5 * MINUTES
    while any(job.poll() is None for job in jobs):
        assert time.monotonic() < end
        talk.look({str(outs[0]): "driver of first", str(outs[1]): "driver of second"})
        time.sleep(2)
    for job, out in zip(jobs, outs, strict=True):
        said = job.communicate()[0]
        assert job.returncode == 0 and "failed" not in said, said
        assert len(lines(out)) == VIDEOS == len({line["key"] for line in lines(out)})
    assert len({line["answer"] for out in outs for line in lines(out)}) == 1  # of one video, four times each
    talk.require_apart("driver of first", "driver of second")


def test_a_submitted_job_that_cannot_run(head: Head, folder: Path) -> None:
    """The exit code and the reason come through; results in Ray's copy of the folder would be lost."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(head.server)
    said = {}
    for name, command in {
        "out": run_command("results.jsonl"), "gpus": run_command("/tmp/unused.jsonl", "--replicas", "64"),
    }.items():  # fmt: skip
        subprocess.run(submitted(head, *command), cwd=folder, env=head.environment, timeout=MINUTES, check=False)
        newest = max(client.list_jobs(), key=lambda job: job.start_time or 0)
        assert newest.driver_exit_code == 2
        said[name] = client.get_job_logs(newest.submission_id)
    assert "--out results.jsonl: Ray deletes the job's working directory" in said["out"]
    assert "needs 64 GPUs, the cluster has 3" in said["gpus"]
