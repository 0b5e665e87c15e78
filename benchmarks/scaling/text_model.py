"""A text model of the same shape, for what stock SGLang does not serve with a vision-language model."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.ttft.model import TEXT


def make_text_model(folder: Path, beside: Path, *, layers: int, positions: int) -> Path:
    """Write a Qwen3 for --load-format dummy into the new folder `folder`; returns it.

    Qwen3, not Qwen2: SGLang shards its attention by the ranks that share weights, Qwen2's by all of them. It norms
    queries and keys and adds no bias to them, which is nothing beside the matrices.

    Args:
        beside: a folder of `benchmarks.ttft.model.make_model`, whose tokenizer it takes.
    """
    from transformers import Qwen3Config

    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = Qwen3Config(
        **TEXT, num_hidden_layers=layers, max_position_embeddings=positions, rope_parameters=rope,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    for path in beside.glob("*token*"):
        shutil.copy(path, folder)
    return folder
