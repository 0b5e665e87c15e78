"""Qwen2.5-VL's vision tower attends frame by frame, as it was trained and as transformers runs it.

Why: in its full-attention blocks SGLang makes one segment of t * h * w patches of a whole video, so that every frame
    sees every other one. That is another function than the model's (greedy answers to an mp4 differ from transformers',
    log probabilities by 0.1 to 0.3), and its cost grows with the square of the video's length.
How: AROUND `Qwen2_5_VisionTransformer.forward`: the grid row (t, h, w) is handed on as t rows (1, h, w). Windows,
    rotary positions and the order of patches are per frame already, so only the full-attention segments change.
    Installed for every backend, the dense ones too, so that a comparison compares attention and nothing else;
    logged once when it first changes a grid. A server without it: SGLANG_PLUGINS without "mm_sglang".
Upstream: sglang/srt/models/qwen2_5_vl.py, cu_seqlens in forward; qwen2_vl.py and qwen3_vl.py beside it use
    compute_cu_seqlens_from_grid_numpy, which is right. The same fault, mended elsewhere: pytorch/torchtitan#4317.
Versions: 0.5.23. Remove when cu_seqlens there repeats h * w for each temporal frame.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

log = logging.getLogger(__name__)


def split_frames(grid_thw: torch.Tensor) -> torch.Tensor:
    """Rows (t, h, w) of [n, 3] as t rows (1, h, w) each."""
    frames = torch.repeat_interleave(grid_thw, grid_thw[:, 0], dim=0)
    frames[:, 0] = 1
    return frames


@cache
def _say_once() -> None:
    log.info("mm_sglang: Qwen2.5-VL's vision tower attends frame by frame (compat/qwen2_5_vl_frames.py)")


def _forward(original: Callable[..., Any], self: Any, x: torch.Tensor, grid_thw: torch.Tensor) -> Any:
    if int(grid_thw[:, 0].max()) > 1:
        _say_once()
        grid_thw = split_frames(grid_thw)
    return original(self, x, grid_thw)


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.models.qwen2_5_vl.Qwen2_5_VisionTransformer.forward", _forward, HookType.AROUND)
