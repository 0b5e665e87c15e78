"""Bad input is HTTP 400 with a line that says what was given and what is needed, and the server goes on serving."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from asking import FORKED
from assets import Assets

from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.demo.video import render_video
from mm_sglang.serve import server_command, sglang_script

pytestmark = pytest.mark.e2e

CONTEXT, POOL = 4096, 2048


@pytest.fixture(scope="module")
def server(assets: Assets) -> Iterator[Server]:
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    extra = ["--dtype", dtype, "--context-length", str(CONTEXT), "--max-total-tokens", str(POOL)]
    extra += [
        "--json-model-override-args",
        json.dumps({"mm_sparse": {"default": {"pattern": "grid"}, "min_tokens": 1}}),
    ]
    command, environment = server_command(str(assets.models["qwen2_5_vl"]), config=None, extra=extra, cores=1)
    with Server(command, environment | FORKED, assets.folder / "bad-input.log") as running:
        yield running


def damaged(folder: Path, name: str) -> Path:
    """A file that is no proper video, made from one that is."""
    path = folder / f"{name}.mp4"
    whole = render_video(folder / "whole.mp4", seconds=4.0, width=224, height=168).path.read_bytes()
    content = {
        "empty": b"",
        "not a video": b"hello, I am a text file\n" * 50,
        "cut off behind its index": whole[: len(whole) * 2 // 3],  # faststart: the index is in front
        "cut off inside its index": whole[:200],
    }
    path.write_bytes(content[name])
    return path


@pytest.mark.parametrize(
    "name, message",
    [
        ("empty", "the video is empty: got 0 bytes"),
        ("not a video", "not a video, or truncated: no decoder opens it"),
        ("cut off behind its index", "the video is truncated or damaged: reading"),
        ("cut off inside its index", "not a video, or truncated: no decoder opens it"),
    ],
)
def test_a_damaged_video(server: Server, assets: Assets, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server.url, [("video", damaged(tmp_path, name)), ("text", "what?")], 4)
    said = refused.value.body["message"]  # type: ignore[index]
    assert message in said and "\n" not in said
    assert len(ask(server.url, assets.prompts["text"], 4).tokens) == 4


@pytest.mark.parametrize("seconds, limit", [(64.0, CONTEXT), (16.0, POOL)])
def test_a_video_that_is_too_long(server: Server, assets: Assets, tmp_path: Path, seconds: float, limit: int) -> None:
    """Longer than the context, and within the context but longer than the KV cache: both numbers are in the answer."""
    long = render_video(tmp_path / "long.mp4", seconds=seconds).path
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server.url, [("video", long), ("text", "what?")], 4)
    said = refused.value.body["message"]  # type: ignore[index]
    needed = seconds * 192 // 1  # 192 tokens a temporal frame of 448 x 336, one a second
    numbers = [int(word.strip("().,")) for word in said.split() if word.strip("().,").isdecimal()]
    assert any(needed <= n <= needed + 64 for n in numbers), said
    assert any(limit - 64 <= n <= limit for n in numbers), said
    assert len(ask(server.url, assets.prompts["video"], 4).tokens) == 4


def test_a_backend_that_cannot_start_says_why(assets: Assets) -> None:
    """SGLang's own command, past the checks of `mm-sglang serve`: the server ends and its log names the reason."""
    model = str(assets.models["qwen2_5_vl"])
    _, environment = server_command(model, config=None, extra=[], cores=1)
    environment |= FORKED
    command = [
        sglang_script(), "serve", model, "--attention-backend", "mm_sparse", "--device", "cpu",
        "--mm-attention-backend", "sdpa", "--max-total-tokens", "2048",
        "--json-model-override-args", json.dumps({"mm_sparse": {"default": {"pattern": "dense"}}}),
    ]  # fmt: skip
    log = assets.folder / "refused.log"
    with pytest.raises(RuntimeError, match="the server ended with code"), Server(command, environment, log):
        pass
    assert "no sparse layer" in log.read_text()
