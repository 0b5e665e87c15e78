"""GPU memory that one long prompt takes, and the share of a GPU that SGLang's weights and KV pool may have beside it.

SGLang's own --mem-fraction-static reserves 1.5 MB a token of a chunk: 49 GB for chunks of 32K, more than a GPU has for
the 128K of four context-parallel ranks, and the pool gets what is left. Counted here is what is really used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_sglang.compat.vision_slices import PATCHES

ELEMENT = 2  # bytes of bf16
# Beside what is counted: decode's CUDA graphs (SGLang has none for these models' prefill, and sizes its pool before it
# captures), workspaces, logits, what the allocator can't use, and the plans among which `auto` chooses. Measured: with
# 4 GB in this place 46.0 were counted where 48.2 were used (benchmarks.video, 246K tokens).
RUNTIME = 7 << 30


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes on each rank for one prompt of `tokens` tokens.

    embedding: the vision cache, which SGLang takes out of the KV pool's share.
    activations: of a chunk; vision: of encoding, while the cache still holds the video before. Never both at once.
    """

    tokens: int
    weights: int
    keys_and_values: int
    embedding: int
    activations: int
    vision: int

    @property
    def static(self) -> int:
        """What --mem-fraction-static is the share of."""
        return self.weights + self.keys_and_values + self.embedding

    @property
    def rest(self) -> int:
        return max(self.activations, self.vision) + RUNTIME

    @property
    def total(self) -> int:
        return self.static + self.rest

    def __str__(self) -> str:
        parts = {
            "weights": self.weights, "KV cache": self.keys_and_values, "vision cache": self.embedding,
            "a chunk or the vision tower": max(self.activations, self.vision), "SGLang": RUNTIME,
        }  # fmt: skip
        return f"{self.tokens} tokens need " + " + ".join(f"{v / 1e9:.1f} GB {k}" for k, v in parts.items())


def embedding_bytes(tokens: int, text: Any, vision: Any) -> int:
    """Of the vision tower's output for `tokens` tokens; Qwen3-VL's holds one more for each of some layers."""
    streams = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return tokens * int(text.hidden_size) * streams * ELEMENT


def count(
    model: str, config: Any, tokens: int, video: int, *, chunk: int, cache: int, ranks: int = 1, spread: int = 1
) -> Needs:
    """Needs of a prompt of `tokens` tokens, `video` of them in one video.

    Args:
        model: of `long_video`; config: its own.
        chunk: tokens prefilled at once, of all context-parallel ranks; cache: bytes of the vision cache.
        ranks: tensor parallel size; spread: context-parallel ranks.
    """
    text, vision = config.text_config, config.vision_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_layer = 2 * max(text.num_key_value_heads // ranks, 1) * head_dim * ELEMENT  # keys and values of a token
    rows = -(-chunk // spread)
    # Gate and up, their product, and the residual stream before and after; all of the chunk's embeddings on each rank
    activations = rows * ELEMENT * (3 * text.intermediate_size // ranks + 4 * text.hidden_size)
    activations += embedding_bytes(chunk, text, vision)
    activations += of_layer * tokens  # of one layer, copied in a recipe's order
    if spread > 1:  # gathered keys and values, queries and output, of the whole chunk
        activations += chunk * (of_layer + 2 * ELEMENT * text.num_attention_heads * head_dim)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    # Residual stream, queries, keys, values, rotary table; the MLP as above; pixels in fp32 and in bf16
    slice_ = PATCHES * (ELEMENT * (10 * vision.hidden_size + 3 * vision.intermediate_size) + 6 * patch)
    made = embedding_bytes(PATCHES // vision.spatial_merge_size**2, text, vision)
    return Needs(
        tokens=tokens,
        weights=_weights(model, config) // ranks,
        keys_and_values=text.num_hidden_layers * of_layer * tokens,
        embedding=cache,
        activations=activations,
        vision=embedding_bytes(video, text, vision) + slice_ + made * (spread + 1 if spread > 1 else 1),
    )


def _weights(model: str, config: Any) -> int:
    """Bytes of a folder's safetensors; of a model that is not here, or has none, as many parameters in bf16."""
    here = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    if here:
        return here
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        made = AutoModelForImageTextToText.from_config(config)
    return ELEMENT * int(sum(parameter.numel() for parameter in made.parameters()))


def require_room(needs: Needs, free: int, fraction: float | None = None) -> None:
    """ValueError unless `free` bytes of GPU memory hold what one such prompt needs.

    Args:
        fraction: --mem-fraction-static, if the user gives it; else `static_fraction` chooses it.
    """
    static = free - needs.rest if fraction is None else int(free * fraction)
    if needs.static > static:
        a_token = needs.keys_and_values // needs.tokens
        fits = max(0, static - needs.static + needs.keys_and_values) // a_token
        given = "" if fraction is None else f", {static / 1e9:.1f} GB of it by --mem-fraction-static {fraction}"
        raise ValueError(
            f"--max-video-tokens: {needs}, {needs.total / 1e9:.1f} GB in all: the GPU has {free / 1e9:.1f} GB free"
            f"{given}, room for {fits} tokens: needs fewer tokens, or more ranks (--tp)"
        )
    if needs.rest > free - static:
        raise ValueError(
            f"--max-video-tokens: {needs}: --mem-fraction-static {fraction} leaves {(free - static) / 1e9:.1f} GB "
            f"for a chunk or the vision tower, and SGLang: needs {math.floor(100 * (1 - needs.rest / free)) / 100} "
            "at most, or smaller chunks (--chunked-prefill-size)"
        )


def static_fraction(needs: Needs, free: int) -> float:
    """--mem-fraction-static that leaves what is needed beside it; the KV pool gets all else."""
    return math.floor(1e4 * (1 - needs.rest / free)) / 1e4
