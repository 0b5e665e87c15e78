"""`mm-sglang job run` refuses bad input in seconds: one clear line, exit code 2, nothing left running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray

from benchmarks.processes import MARK, left_behind, new_mark
from mm_sglang.cli import main
from mm_sglang.jobs.results import Results
from mm_sglang.ports import leased_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's config.json and a file to call a video: nothing here gets as far as reading them."""
    folder = tmp_path_factory.mktemp("job")
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": {"num_hidden_layers": 4, "num_attention_heads": 64, "num_key_value_heads": 64},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "video.mp4").write_bytes(b"video")
    (folder / "no-schema.json").write_text('{"type": "strin"}')
    return folder


BEFORE: list[tuple[list[str], list[str], str]] = [
    ([], [], "no videos: needs at least one file"),
    (["gone.mp4"], [], "gone.mp4: needs a file"),
    (["video.mp4"], ["--schema", "no-schema.json"], "not a JSON schema"),
    (["video.mp4"], ["--gpus", "0"], "--gpus 0: needs at least 1"),
    (["video.mp4"], ["--gpus", "64"], "needs 64 GPUs, the cluster has"),
    (["video.mp4"], ["--gpus", "2", "--replicas", "64"], "needs 128 GPUs, the cluster has"),
    (["video.mp4"], ["--out", "video.mp4/out.jsonl"], "cannot be written"),
    (["video.mp4"], ["--tp", "2"], "--tp: a job's ranks are counted by --gpus"),
    (["video.mp4"], ["--attn-cp-size=2"], "--attn-cp-size: a job's ranks are counted by --gpus"),
    (["video.mp4"], ["--gpus", "2", "--enable-mixed-chunk"], "--enable-mixed-chunk: context parallelism needs none"),
    (["video.mp4"], ["--attention-backend", "fa3"], "--attention-backend fa3: nothing would be sparse"),
    (["video.mp4"], ["--gpus", "3", "--split", "tensor"], "64 query heads over 3 ranks"),
    (["video.mp4"], ["--max-video-tokens", "9"], "--max-video-tokens 9: needs at least 1024"),
    (["video.mp4"], ["--sparse-config", "gone.yaml"], "gone.yaml"),
]
JOINING: list[tuple[list[str], list[str], str]] = [
    (["video.mp4"], ["--address", "PORT"], "no Ray cluster there"),
    (["video.mp4"], ["--address", "nonsense"], "needs host:port"),
]


def command(videos: list[str], options: list[str]) -> list[str]:
    out = [] if "--out" in options else ["--out", "out.jsonl"]
    return ["job", "run", *videos, "--question", "?", "--model", ".", *options, *out]


def require_one_line(said: str, message: str) -> None:
    assert len(said.strip().splitlines()) == 1 and message in said, said


@pytest.mark.parametrize(("videos", "options", "message"), BEFORE)
def test_what_is_refused_before_ray_is_looked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    videos: list[str], options: list[str], message: str,
) -> None:  # fmt: skip
    """Inside this process: a Python of its own takes seconds, and Ray was not started."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", Mock(side_effect=AssertionError("Ray was started")))
    assert main(command(videos, options)) == 2
    require_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(("videos", "options", "message"), [BEFORE[0], BEFORE[4], *JOINING])
def test_bad_input(folder: Path, videos: list[str], options: list[str], message: str) -> None:
    mark = new_mark()
    port, _lease = leased_port()
    options = [option.replace("PORT", f"127.0.0.1:{port}") for option in options]
    result = subprocess.run(
        [sys.executable, "-m", "mm_sglang", *command(videos, options)],
        cwd=folder, capture_output=True, text=True, timeout=60, env=os.environ | {MARK: mark},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    require_one_line(result.stderr, message)
    assert left_behind(mark) == []


def test_a_file_that_another_job_writes(folder: Path) -> None:
    from mm_sglang.jobs.run import JobOptions, run_job

    with Results(folder / "used.jsonl"), pytest.raises(ValueError, match="another job is writing it"):
        run_job(
            JobOptions(
                videos=(folder / "video.mp4",), question="?", model=str(folder), out=folder / "used.jsonl"
            )
        )  # fmt: skip
