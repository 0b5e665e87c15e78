"""On a GPU this version refuses by name, and a stock server with the plugin loaded serves as ever."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
import torch
from assets import Assets
from hf_reference import HuggingFace

from mm_sglang.check import checks
from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.serve import sglang_script

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]


def test_mm_sparse_refuses_to_start_and_says_why(assets: Assets) -> None:
    command = [sglang_script(), "serve", str(assets.models["qwen2_5_vl"]), "--attention-backend", "mm_sparse"]
    log = assets.folder / "gpu-refused.log"
    with pytest.raises(RuntimeError, match="the server ended with code"), Server(command, {}, log):
        pass
    assert "mm_sparse on device 'cuda': this version has no kernels for it" in log.read_text()
    assert next(fine for what, fine, _ in checks() if what == "device") is False


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl"])
def test_a_stock_server_with_the_plugin_answers_as_transformers(
    architecture: str, assets: Assets, tmp_path: Path
) -> None:
    """bf16 on both sides, so the first token alone is compared; the hooks for videos are at work."""
    model = HuggingFace(assets.models[architecture])
    model.model.to(device="cuda", dtype=torch.bfloat16)
    command = [sglang_script(), "serve", str(assets.models[architecture]), "--dtype", "bfloat16"]
    command += ["--mem-fraction-static", "0.3", "--max-running-requests", "8"]
    with Server(command, {}, assets.folder / f"gpu-{architecture}.log") as server:
        got = {name: ask(server.url, parts, 1).tokens for name, parts in assets.prompts.items()}
        cut = tmp_path / "cut.mp4"
        whole = (assets.folder / "wide.mp4").read_bytes()
        cut.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(openai.BadRequestError, match="truncated"):
            ask(server.url, [("video", cut), ("text", "what?")], 1)
    assert got == {name: model.greedy(parts, 1) for name, parts in assets.prompts.items()}
