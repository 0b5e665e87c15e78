"""Reordering so that what matters is contiguous: kept rows and columns first, the rest after, each in prompt order."""

from __future__ import annotations

import torch

TILE = 128  # queries and keys of a tile: FA4's on SM90, where 128 x 128 is the size that ran at dense speed
PAD = 2**31 - 1  # position of a padding slot: later than every query, so that no query ever sees it


def kept_first(kept: torch.Tensor, first_position: int) -> torch.Tensor:
    """Order of one chunk's queries or keys, int32 [R, tiles * TILE], filled up with PAD.

    A stable partition (two prefix sums, no sort). It is a permutation, so no token can be computed twice.

    Args:
        kept: bool [R, N].
        first_position: position of entry 0: the prefix for queries, 0 for keys.
    """
    rows, count = kept.shape
    front = torch.cumsum(kept, 1)
    back = front[:, -1:] + torch.cumsum(~kept, 1)
    slot = torch.where(kept, front, back) - 1
    order = torch.full((rows, -(-count // TILE) * TILE), PAD, dtype=torch.int32, device=kept.device)
    position = torch.arange(first_position, first_position + count, dtype=torch.int32, device=kept.device)
    return order.scatter_(1, slot, position.expand(rows, -1))
