"""`mm-sglang job run` on a Ray of this machine's own: answers, schema, resumption, faults, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from assets import Assets
from recipes import SHARED

from benchmarks.processes import MARK, left_behind, new_mark
from benchmarks.soak import soak
from benchmarks.soak_figures import NOTICED_S, Fault

pytestmark = pytest.mark.e2e
SCHEMA = {
    "type": "object",
    "properties": {"indoors": {"type": "boolean"}, "people": {"enum": [0, 1, 2]}},
    "required": ["indoors", "people"],
    "additionalProperties": False,
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_job_from_answers_to_the_last_process(assets: Assets, tmp_path: Path) -> None:
    """One video is answered as the schema says, one is no video, one vanishes while the job runs."""
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "gone.mp4").write_bytes((assets.folder / "tall.mp4").read_bytes())
    out = tmp_path / "out.jsonl"
    command = [
        sys.executable, "-m", "mm_sglang", "job", "run", str(assets.folder / "wide.mp4"), "text.mp4", "gone.mp4",
        "--question", "what is it?", "--model", str(assets.models["qwen2_5_vl"]), "--schema", "schema.json",
        "--out", str(out), "--max-tokens", "64", "--max-total-tokens", "4096",
    ]  # fmt: skip
    mark = new_mark()
    environment = os.environ | {MARK: mark}
    log, end = tmp_path / "stderr", time.monotonic() + 150
    with log.open("w") as stderr:
        first = subprocess.Popen(command, cwd=tmp_path, stderr=stderr, env=environment)
    try:
        while first.poll() is None and time.monotonic() < end and "3 inputs, 0 of them" not in log.read_text():
            time.sleep(0.1)
        (tmp_path / "gone.mp4").unlink()  # it was read for its key; the replica starts before it is asked about
        first.wait(timeout=end - time.monotonic())
    finally:
        first.kill()
    assert first.returncode == 1, log.read_text()
    found = {Path(line["video"]).name: line for line in lines(out)}
    assert len(lines(out)) == len(found) == 3
    answer = found["wide.mp4"]["answer"]
    assert (
        set(answer) == {"indoors", "people"} and isinstance(answer["indoors"], bool) and answer["people"] in (0, 1, 2)
    )
    assert sum(tokens for tokens, _ in found["wide.mp4"]["chunks"]) == found["wide.mp4"]["prompt_tokens"]
    assert "not a video" in found["text.mp4"]["error"]
    assert "vanished while the job ran" in found["gone.mp4"]["error"]
    assert left_behind(mark) == []

    with out.open("ab") as file:  # as if the job had been killed in the middle of a line
        file.write(b'{"key": "torn')
    again = subprocess.run(
        [*command[:5], str(assets.folder / "wide.mp4"), *command[8:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "1 of them done before" in again.stderr and len(lines(out)) == 3


def test_settings_that_only_a_rank_can_refuse(assets: Assets, tmp_path: Path) -> None:
    """SGLang makes a RuntimeError of a rank's; it is bad input all the same, and not tried again."""
    mark = new_mark()
    job = subprocess.run(
        [
            sys.executable, "-m", "mm_sglang", "job", "run", str(assets.folder / "wide.mp4"), "--question", "?",
            "--model", str(assets.models["qwen2_5_vl"]), "--out", str(tmp_path / "out.jsonl"),
            "--max-total-tokens", "4096", "--kv-cache-dtype", "fp8_e4m3",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=240, env=os.environ | {MARK: mark},
    )  # fmt: skip
    said = job.stderr.splitlines()
    assert job.returncode == 2 and len(said) == 2, job.stderr  # how many inputs there are, and why not
    assert "replica 0 does not start: mm_sparse does not serve a KV cache of torch.float8_e4m3fn" in said[1]
    assert left_behind(mark) == []


def test_a_killed_rank_an_abort_every_host_lost_and_a_stopped_rank(tmp_path: Path) -> None:
    """In the middle of prefills of one job: `soak` raises if a result is lost or doubled, a page or a process left, a
    mark missed. Where every host is lost, one joins once the job says that it waits.

    A gang takes most of a minute to start on two cores, so the one that was stopped, last, is not waited for.
    """
    heard: list[Fault] = []
    kinds = ["kill", "abort", "nodes", "stop"]
    found = soak(kinds, tmp_path, random.Random(0), come_back=False, slack=SHARED, on_fault=heard.append)
    assert [fault["kind"] for fault in heard] == kinds
    assert [found[name]["of"] for name in ("noticed_s", "back_s", "free_s")] == [3, 2, 1]
    lost = heard[2]
    assert lost["noticed_s"] <= SHARED * NOTICED_S
    assert lost["waited"] == "needs 2 GPUs (0 of the cluster's 0 are free) and 2 CPUs (0 of the cluster's 0 are free)"
