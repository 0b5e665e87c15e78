"""What a server needs for videos of N tokens: SGLang's limits lifted where they would cut or stall, memory counted.

What would go wrong without: frames past 768 and pixels past about 115,000 tokens are dropped; a video whose embedding
does not fit the vision cache is encoded again for every chunk; prompts past the model's context are refused; a chunk
that takes longer than the watchdog ends the server. Positions need no scaling: in Qwen2.5-VL and Qwen3-VL a video's
rotary positions advance by frames, rows and columns, some ten thousand for a million tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_sglang.kernels.layout import TokenLayout

TEXT = 32768  # tokens of text a prompt may have beside its video
# Of a rank: within 10% of 128K at a million tokens for 17 GB less (README); an MLP's memory grows with it. Context-
# parallel ranks share a chunk, and what each of them repeats (selecting, copying keys) costs once a chunk.
CHUNK = 32768
LEAST_PER_FRAME = 128  # tokens that SGLang's smallest frame has; a token lasts two frames
MEDIA_MB = 8192
WATCHDOG_S = 3600
ELEMENT = 2  # bytes of bf16


def embedding_bytes(tokens: int, text: Any, vision: Any) -> int:
    """Of the vision tower's output for `tokens` tokens; Qwen3-VL's holds one more for each of some layers."""
    streams = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return tokens * int(text.hidden_size) * streams * ELEMENT


def encoded_again(layout: TokenLayout, chunk: int, text: Any, vision: Any, cache_mb: int) -> str | None:
    """What to tell the user of a chunked prompt with an item too large for SGLang's vision cache; None if all fit.

    Args:
        layout: of the prompt; chunk: its tokens, as this batch prefills them.
    """
    largest = max((item.frames * item.frame_tokens for item in layout.items), default=0)
    size = embedding_bytes(largest, text, vision)
    if chunk == layout.length or size <= cache_mb << 20:
        return None
    return (
        f"an image or video of {largest} tokens has an embedding of {size / (1 << 20):.0f} MB, SGLang's vision cache "
        f"holds {cache_mb}: it is encoded again for every chunk. Set SGLANG_VLM_CACHE_SIZE_MB, or mm-sglang serve "
        "--max-video-tokens"
    )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """GPU memory in bytes on each rank, for one prompt of `tokens` tokens."""

    tokens: int
    weights: int
    keys_and_values: int
    embedding: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.keys_and_values + self.embedding + self.activations

    def __str__(self) -> str:
        parts = {
            "weights": self.weights, "KV cache": self.keys_and_values, "vision embedding": self.embedding,
            "activations of a chunk": self.activations,
        }  # fmt: skip
        return f"{self.tokens} tokens need " + " + ".join(f"{v / 1e9:.1f} GB {k}" for k, v in parts.items())


@dataclass(frozen=True, kw_only=True)
class LongVideo:
    """Flags and environment for `sglang serve`, and what they will use."""

    flags: dict[str, str]
    environment: dict[str, str]
    needs: Needs


def long_video(model: str, tokens: int, *, ranks: int = 1, spread: int = 1) -> LongVideo:
    """For videos of up to `tokens` tokens after the vision tower's merging.

    Args:
        model: folder or Hugging Face name, of a known architecture.
        ranks: tensor parallel size; spread: context-parallel ranks, each with all weights, keys and values.

    Raises:
        ValueError: fewer than 1024 tokens, or a model whose configuration can't be read.
    """
    if tokens < 1024:
        raise ValueError(f"--max-video-tokens {tokens}: needs at least 1024")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
        text, vision = config.text_config, config.vision_config
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--max-video-tokens: model {model}: {' '.join(str(error).split())[:200]}") from error
    side = vision.patch_size * vision.spatial_merge_size
    frames = max(768, 2 * tokens // LEAST_PER_FRAME)
    embedding = embedding_bytes(tokens, text, vision)
    process = {"video": {"fps": 2, "max_frames": frames, "total_pixels": tokens * side * side}}
    return LongVideo(
        flags={
            "--context-length": str(tokens + TEXT),
            "--chunked-prefill-size": str(CHUNK * spread),
            "--max-prefill-tokens": str(CHUNK * spread),
            "--mm-process-config": json.dumps(process),
            "--media-url-max-file-size-mb": str(MEDIA_MB),
            "--watchdog-timeout": str(WATCHDOG_S),
        },
        environment={
            "SGLANG_VLM_CACHE_SIZE_MB": str(math.ceil(embedding / (1 << 20)) + 64),
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        },
        needs=_needs(model, text, tokens + TEXT, embedding, ranks, spread),
    )


def _needs(model: str, text: Any, tokens: int, embedding: int, ranks: int, spread: int) -> Needs:
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = max(text.num_key_value_heads // ranks, 1)
    # Queries and output of the whole chunk, of which a rank computes its own rows
    shared = 2 * CHUNK * ELEMENT * text.num_attention_heads * head_dim * spread if spread > 1 else 0
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors")) if Path(model).is_dir() else 0
    return Needs(
        tokens=tokens,
        weights=weights // ranks,
        keys_and_values=2 * text.num_hidden_layers * heads * head_dim * ELEMENT * tokens,
        embedding=embedding,
        # gate and up, their product, and the residual stream before and after
        activations=CHUNK * ELEMENT * (3 * text.intermediate_size // ranks + 4 * text.hidden_size) + shared,
    )


def require_room(needs: Needs, free: int) -> None:
    """ValueError unless `free` bytes of GPU memory hold what one such prompt needs."""
    if needs.total > free:
        a_token = needs.keys_and_values // needs.tokens
        fits = max(0, free - needs.weights - needs.embedding - needs.activations) // a_token
        raise ValueError(
            f"--max-video-tokens: {needs}, {needs.total / 1e9:.1f} GB in all: the GPU has {free / 1e9:.1f} GB free, "
            f"room for {fits} tokens: needs fewer tokens, or more ranks (--tp)"
        )
