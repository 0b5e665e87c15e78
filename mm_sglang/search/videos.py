"""Videos as SGLang would sample them, and what is wrong with one, known before any model is loaded."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LEAST_TOKENS = 1024  # of a prompt


def content_of(path: Path) -> str:
    """Hash of a file: under one name there may be another video tomorrow."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def sampled_frames(path: Path, limits: Mapping[str, Any] | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """The frames that SGLang would sample from an mp4, [T, C, H, W], and their metadata.

    Args:
        limits: of frames and pixels, "video" in SGLang's --mm-process-config; default: SGLang's own.
    """
    from sglang.srt.multimodal.processors.qwen_vl import preprocess_video

    if not torch.cuda.is_available():
        from mm_sglang.compat import cpu_pin_memory

        cpu_pin_memory.install()
    frames, metadata = asyncio.run(preprocess_video(_opened(path), video_config=dict(limits or {})))
    return frames, metadata


def require_length(path: Path, limits: Mapping[str, Any], side: int) -> None:
    """ValueError if a video is missing, unreadable or shorter than LEAST_TOKENS; only short ones are decoded.

    Args:
        side: pixels of a token's side.
    """
    from sglang.srt.multimodal.processors.qwen_vl import VIDEO_MIN_PIXELS, smart_nframes

    video = _opened(path)
    try:
        frames = smart_nframes(dict(limits), total_frames=len(video), video_fps=video.avg_fps)
        if frames // 2 * (VIDEO_MIN_PIXELS // side**2) >= LEAST_TOKENS:
            return
        count, _, high, wide = sampled_frames(path, limits)[0].shape
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"video {path}: {' '.join(str(error).split())}") from error
    tokens = (count + 1) // 2 * (high // side) * (wide // side)
    if tokens < LEAST_TOKENS:
        raise ValueError(f"video {path}: gives {tokens} tokens: needs at least {LEAST_TOKENS}")


def _opened(path: Path) -> Any:
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    if not path.is_file():
        raise ValueError(f"video {path}: no such file")
    try:
        return VideoDecoderWrapper(path.read_bytes())
    except Exception as error:  # each decoder has its own
        raise ValueError(
            f"video {path}: no video that can be decoded ({' '.join(str(error).split())[:100]})"
        ) from error
