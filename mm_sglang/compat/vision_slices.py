"""Qwen2.5-VL's and Qwen3-VL's vision tower in slices of whole frames, which context-parallel ranks share out.

Why: SGLang runs a whole video through the tower in one call: at a million tokens 4.2 M patches, whose gate and up
    projections alone are 57 GB. Its sharing (--mm-enable-dp-encoder) goes over the ranks of attention's tensor
    parallelism, of which there is one under context parallelism, and by whole items: every rank would encode all.
How: the loaded tower's forward is wrapped, for mm_sparse only. A frame is attended by itself in both (for Qwen2.5-VL
    see qwen2_5_vl_frames.py), so frames run as items of their own, PATCHES at a time, into one output. Ranks each run
    their share and gather slice by slice, so that none holds the embedding twice; for them --mm-enable-dp-encoder is
    set, so that every rank has whole weights and nothing communicates inside. SGLang caches the whole by content hash
    on every rank, because a later chunk's rows may be any rank's.
Upstream: sglang/srt/models/qwen2_5_vl.py, qwen3_vl.py get_video_feature; sglang/srt/multimodal/mm_utils.py
    run_dp_sharded_mrope_vision_model.
Versions: 0.5.23. Remove when SGLang bounds a tower's patches and shares out frames over context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.parallel.vision import Frames, frame_shares, own_grids, patches, slices

PATCHES = 1 << 16  # of a slice: some 2 GB in a tower of 1280 dimensions, and rows enough for its matrix products


def encode_in_slices(tower: Any, ranks: Ranks | None) -> None:
    """Wrap the forward of this vision tower: [patches, patch size] and grids [items, 3] in, [tokens, hidden] out.

    The patches may be anything that gives tensors when it is sliced. None: a model loaded without its tower.
    """
    if tower is None:
        return
    original, unit = tower.forward, tower.spatial_merge_size**2
    size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)

    def room(tokens: int) -> torch.Tensor:
        return torch.empty(tokens, tower.out_hidden_size, dtype=tower.dtype, device=tower.device)

    def forward(x: Any, grid_thw: Any) -> torch.Tensor:
        grids = torch.as_tensor(grid_thw).tolist()
        shares = frame_shares(grids, size)
        plans = [slices(grids, share, PATCHES) for share in shares]
        counts = [[patches(grids, part) // unit for part in plan] for plan in plans]
        if ranks is None and len(plans[0]) == 1:
            encoded: torch.Tensor = original(x[: len(x)], grid_thw=grid_thw)
            return encoded

        def run(part: Sequence[Frames], first: int, count: int) -> torch.Tensor:
            grid = torch.tensor(own_grids(grids, part))
            made: torch.Tensor = original(x[first * unit : (first + count) * unit], grid_thw=grid)
            return made

        at = [sum(map(sum, counts[:n])) for n in range(size)]  # a rank's frames are neighbours
        out = room(sum(map(sum, counts)))
        if ranks is None:
            for part, count in zip(plans[0], counts[0], strict=True):
                out[at[0] : at[0] + count] = run(part, at[0], count)
                at[0] += count
            return out
        own = room(max(map(max, filter(None, counts))))
        for turn in range(max(map(len, plans))):
            now = [of_rank[turn] if turn < len(of_rank) else 0 for of_rank in counts]
            if now[rank]:
                own[: now[rank]] = run(plans[rank][turn], at[rank], now[rank])
            parts = ranks.gather(own[: max(now)])().view(size, max(now), -1)
            for n, count in enumerate(now):
                out[at[n] : at[n] + count] = parts[n, :count]
                at[n] += count
        return out

    tower.forward = forward
