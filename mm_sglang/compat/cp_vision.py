"""Qwen2.5-VL's and Qwen3-VL's vision tower under context parallelism: frames shared out by cost, embeddings gathered.

Why: SGLang's own sharing (--mm-enable-dp-encoder) goes over the ranks of attention's tensor parallelism, of which
    there is one here, and by whole items: every rank would encode the whole of a video.
How: that flag is set, so that every rank has whole weights and nothing communicates inside; the loaded tower's forward
    is wrapped: each rank runs it on its frames, as items of their own, and all gather the embeddings. A frame is
    attended by itself in both (for Qwen2.5-VL see qwen2_5_vl_frames.py). SGLang caches the whole by content hash on
    every rank, because a later chunk's rows may be any rank's.
Upstream: sglang/srt/models/qwen2_5_vl.py, qwen3_vl.py get_video_feature; sglang/srt/multimodal/mm_utils.py
    run_dp_sharded_mrope_vision_model.
Versions: 0.5.23. Remove when that shares out frames over context-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.parallel.vision import frame_shares, patches


def share_frames(tower: Any, ranks: Ranks) -> None:
    """Wrap the forward of this vision tower: [patches, patch size] and grids [items, 3] in, [tokens, hidden] out."""
    original, unit = tower.forward, tower.spatial_merge_size**2

    def forward(x: torch.Tensor, grid_thw: Any) -> torch.Tensor:
        grids = torch.as_tensor(grid_thw).tolist()
        shares = frame_shares(grids, ranks.size)
        counts = [patches(grids, share) // unit for share in shares]
        own = shares[ranks.rank]
        out = torch.zeros(max(counts), tower.out_hidden_size, dtype=tower.dtype, device=tower.device)
        if own:
            start = sum(counts[: ranks.rank]) * unit  # a rank's frames are neighbours
            grid = torch.tensor([[f.last - f.first, *grids[f.item][1:]] for f in own])
            out[: counts[ranks.rank]] = original(x[start : start + counts[ranks.rank] * unit], grid_thw=grid)
        parts = ranks.gather(out)().view(ranks.size, *out.shape)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    tower.forward = forward
