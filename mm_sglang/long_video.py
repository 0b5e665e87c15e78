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
from typing import Any

from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.memory import Needs, count, embedding_bytes, require_room, static_fraction

TEXT = 32768  # tokens of text a prompt may have beside its video
# Of a rank: within 10% of 128K at a million tokens for 17 GB less (README); an MLP's memory grows with it. Context-
# parallel ranks share a chunk, and what each of them repeats (selecting, copying keys) costs once a chunk.
CHUNK = 32768
LEAST_PER_FRAME = 128  # tokens that a frame has where a video has as many as it may; a token lasts two frames
STAMP = 12  # tokens of text that Qwen3-VL has before each, "<1234.5 seconds>"
MEDIA_MB = 8192
WATCHDOG_S = 3600


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
class LongVideo:
    """Flags and environment for `sglang serve`, and what they will use."""

    flags: dict[str, str]
    environment: dict[str, str]
    needs: Needs


def long_video(
    model: str, tokens: int, *, ranks: int = 1, spread: int = 1, chunk: int | None = None, free: int | None = None,
    fraction: float | None = None, cache_mb: int | None = None,
) -> LongVideo:  # fmt: skip
    """For videos of up to `tokens` tokens after the vision tower's merging.

    Args:
        model: folder or Hugging Face name, of a known architecture.
        ranks: tensor parallel size; spread: context-parallel ranks, each with all weights, keys and values.
        chunk, fraction, cache_mb: --chunked-prefill-size, --mem-fraction-static and SGLANG_VLM_CACHE_SIZE_MB, where
            the user gives them.
        free: bytes of the server's GPU; None: not known here.

    Raises:
        ValueError: fewer than 1024 tokens, a model whose configuration can't be read, or too little memory.
    """
    _require_tokens(tokens)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
        text, vision = config.text_config, config.vision_config
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--max-video-tokens: model {model}: {' '.join(str(error).split())[:200]}") from error
    side = vision.patch_size * vision.spatial_merge_size
    pairs = tokens // LEAST_PER_FRAME
    context = tokens + TEXT + (STAMP * pairs if config.model_type == "qwen3_vl" else 0)
    chunk = CHUNK * spread if chunk is None else chunk if chunk > 0 else context
    if cache_mb is None:
        cache_mb = math.ceil(embedding_bytes(tokens, text, vision) / (1 << 20)) + 64
    needs = count(
        model, config, context, tokens, chunk=min(chunk, context), cache=cache_mb << 20, ranks=ranks, spread=spread
    )
    flags = {
        "--context-length": str(context),
        "--chunked-prefill-size": str(chunk),
        "--max-prefill-tokens": str(chunk),
        "--mm-process-config": json.dumps({"video": video_limits(tokens, side)}),
        "--media-url-max-file-size-mb": str(MEDIA_MB),
        "--watchdog-timeout": str(WATCHDOG_S),
    }
    if free is not None:
        require_room(needs, free, fraction)
        flags["--mem-fraction-static"] = str(static_fraction(needs, free))
    environment = {"SGLANG_VLM_CACHE_SIZE_MB": str(cache_mb), "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    return LongVideo(flags=flags, environment=environment, needs=needs)


def _require_tokens(tokens: int) -> None:
    if tokens < 1024:
        raise ValueError(f"--max-video-tokens {tokens}: needs at least 1024")


def video_limits(tokens: int, side: int) -> dict[str, Any]:
    """--mm-process-config's "video", by which no video has more than `tokens` tokens of `side` x `side` pixels.

    SGLang shares out `total_pixels` over the frames but gives each 1.05 * `min_pixels` whatever their number, and small
    frames that it enlarges up to twice `min_pixels`, by rounding up. So that neither is more than its share, frames are
    so few that a share has LEAST_PER_FRAME, and `min_pixels` is less than half of one. transformers' processor resizes
    after that, to multiples of `side` (SGLang's are of 28): Qwen3-VL's by `size` of the whole video, whose own limit is
    12,288 tokens; Qwen2.5-VL's by `size` of a frame, which those limits leave as it is.

    Raises:
        ValueError: fewer than 1024 tokens.
    """
    _require_tokens(tokens)
    return {
        "fps": 2,
        "max_frames": 2 * (tokens // LEAST_PER_FRAME),
        "min_pixels": (LEAST_PER_FRAME // 2 - 1) * side**2,
        "total_pixels": tokens * side**2,
        "size": {"shortest_edge": side**2, "longest_edge": 2 * tokens * side**2},
    }
