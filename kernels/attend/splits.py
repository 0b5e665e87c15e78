"""Few query tiles with long lists: each list in parts that run side by side, merged by their log-sum-exps.

A question's tile against a million keys walks 8,192 tiles on one processor while most of the others idle;
flash-decoding (Dao et al., 2023) splits keys for the same reason. An engine runs the parts as query tiles of their own.

Legend: P parts, R orders of g heads, G = R * g, M query tiles, W width of a list, T = TILE, D head dimension.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import TileLists

PROCESSORS = 132  # of an H100 and an H200; on others the parts are as right, if not as many as would fit
LEAST_TILES = 64  # of a part: 0.1 ms of an H200's processor, some ten times what a launch takes


def parts_for(heads: int, key_tiles: int) -> int:
    """How many parts fill the processors when `heads` of one query tile each list `key_tiles`."""
    return max(1, min(PROCESSORS // heads, key_tiles // LEAST_TILES))


def split(lists: TileLists, parts: int) -> TileLists:
    """The lists as those of P * M query tiles, part after part: full tiles in equal runs, partial ones in the last.

    No part is empty where a full list is within LEAST_TILES - P of its width, as it is for queries at the keys' end.
    """
    width = -(-lists.full_index.shape[2] // parts)
    first = torch.arange(parts, device=lists.full_count.device, dtype=torch.int32)[:, None] * width  # [P, 1]
    full = (lists.full_count[:, None] - first).clamp(0, width)  # [G, P, M]
    runs = torch.nn.functional.pad(lists.full_index, (0, parts * width - lists.full_index.shape[2]))
    runs = runs.view(*full.shape[::2], parts, width).transpose(1, 2)  # [G, P, M, W / P]
    partial = torch.zeros_like(full)
    partial[:, -1] = lists.partial_count
    return TileLists(
        first=lists.first, full_count=full.flatten(1), full_index=runs.flatten(1, 2).contiguous(),
        partial_count=partial.flatten(1), partial_index=lists.partial_index.repeat(1, parts, 1),
    )  # fmt: skip


def merged(out: torch.Tensor, lse: torch.Tensor, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of the parts, [R, P * M * T, g, D] and [R, g, P * M * T], as one: [R, M * T, g, D] and [R, g, M * T]."""
    each = lse.view(*lse.shape[:2], parts, -1)  # [R, g, P, rows]
    whole = each.logsumexp(2)
    share = (each - whole[:, :, None]).exp().permute(0, 2, 3, 1)[..., None]  # [R, P, rows, g, 1]
    return (out.view(len(out), parts, -1, *out.shape[2:]).float() * share).sum(1).to(out.dtype), whole
