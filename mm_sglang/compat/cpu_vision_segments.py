"""Long videos in the vision tower on the plain-CPU platform.

Why: `VisionSdpaAttention`, the only vision attention for a plain CPU, attends all patches of a video at once
    under a mask of patches x patches: a minute of small frames (49,152 patches) asks for 38 GB, the scheduler dies.
How: AROUND its forward: where the segments of `cu_seqlens` (frames, or windows of a frame) are all that the mask
    would say, attend each by itself, equal lengths in one call. Same result, memory linear in patches.
Upstream: sglang/srt/layers/attention/vision.py VisionSdpaAttention (GPU backends pass cu_seqlens to varlen kernels).
Versions: 0.5.23. Remove when it goes by segments itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def attend_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """Full attention inside each segment: [s, H, D].

    Args:
        q: [s, H, D]; k and v: [s, Hkv, D].
        cu_seqlens: [n + 1] segment bounds from 0 to s; empty segments are allowed.
    """
    out = torch.empty_like(q)
    starts, lengths = cu_seqlens[:-1].long().cpu(), cu_seqlens.diff().long().cpu()
    for length in set(lengths.tolist()):
        if length == 0:  # windows that fall outside the frame
            continue
        rows = starts[lengths == length][:, None] + torch.arange(length)  # [segments, length]
        part_q, part_k, part_v = (x[rows].transpose(1, 2) for x in (q, k, v))  # [segments, heads, length, D]
        seen = scaled_dot_product_attention(part_q, part_k, part_v, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        out[rows] = seen.transpose(1, 2)
    return out


def _forward(
    original: Callable[..., torch.Tensor],
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bsz: int,
    cu_seqlens: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    by_segments = self.flatten_batch and attention_mask is None and not self.softmax_in_single_precision
    if not by_segments or cu_seqlens is None or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(q):
        return original(self, q, k, v, bsz, cu_seqlens=cu_seqlens, attention_mask=attention_mask, **kwargs)
    return attend_segments(q, k, v, cu_seqlens, self.scale)


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.layers.attention.vision.VisionSdpaAttention.forward", _forward, HookType.AROUND)
