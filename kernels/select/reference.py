"""Budgets as fixed counts. (Coverage budgets and selection without sorting come with the GPU twin.)"""

from __future__ import annotations

import torch


def top_budget(mass: torch.Tensor, budget: int, forced: torch.Tensor) -> torch.Tensor:
    """Bool [R, N]: per row, the `budget` entries of greatest mass, the forced ones first and always.

    Args:
        mass: [R, N], any non-negative score.
        budget: entries kept, at least 1; all N if it is larger. Forced entries count, and are kept even beyond it.
        forced: bool [N].
    """
    keep = min(max(budget, int(forced.sum())), mass.shape[1])
    ranked = mass.masked_fill(forced, float("inf")).topk(keep, dim=1).indices
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, ranked, True)
