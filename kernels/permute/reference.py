"""Reordering so that what matters is contiguous: kept columns first, then the rest, by class; each ascending."""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import PAD, TILE


def key_order(
    kept: torch.Tensor, classes: torch.Tensor | None, segments: int, tiles: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segment 0 holds the kept keys, segment c the others of class c: a stable partition, so no key stands twice.

    Args:
        kept: bool [R, N].
        classes: uint8 [N] in 1..segments-1; None: all 1.
        segments: S.
        tiles: of the order; each segment starts a new tile, so ceil(N / TILE) + S - 1 always suffice. What does not
            fit is cut off (for orders of which only segment 0, of known size, is wanted).

    Returns:
        order int32 [R, tiles * TILE] of indices 0..N-1, PAD where a segment leaves its last tile open;
        start int32 [R, S + 1] first slot of each segment and the end of the last;
        rank int32 [R, S, N + 1]: entries of a segment below each index.
    """
    rows, count = kept.shape
    other = torch.ones(count, dtype=torch.long, device=kept.device) if classes is None else classes.long()
    segment = torch.where(kept, 0, other)  # [R, N]
    member = segment[:, None] == torch.arange(segments, device=kept.device)[:, None]  # [R, S, N]
    rank = torch.nn.functional.pad(torch.cumsum(member, 2), (1, 0))
    size = (rank[:, :, -1] + TILE - 1) // TILE * TILE
    start = torch.nn.functional.pad(torch.cumsum(size, 1), (1, 0))
    slot = start.gather(1, segment) + rank[:, :, :-1].gather(1, segment[:, None])[:, 0]
    order = torch.full((rows, max(tiles, int(start[:, -1].max()) // TILE) * TILE), PAD, device=kept.device)
    order.scatter_(1, slot, torch.arange(count, device=kept.device).expand(rows, -1))
    return order[:, : tiles * TILE].int(), start.int(), rank.int()
