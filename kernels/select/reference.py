"""Budgets: a fixed count, or a coverage (share of the estimated mass) with the count as its limit."""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import Bands

DROPPED_BITS = 18  # of a mass's fp32 form: what is left tells masses apart by 3 %, and ties go to the first


def grade(mass: torch.Tensor) -> torch.Tensor:
    """Masses (fp32, not negative) as small integers in their order; those within 1/32 of a power of two are equal."""
    return mass.contiguous().view(torch.int32) >> DROPPED_BITS


def top_budget(
    mass: torch.Tensor, keep: int, coverage: float | None, forced: int, allowed: torch.Tensor | None
) -> torch.Tensor:
    """Bool [R, N]: per row the entries of greatest mass, the forced ones first and always.

    Args:
        mass: fp32 [R, N], not negative.
        keep: entries kept at most, the forced ones among them (and all of these, if they are more).
        coverage: stop as soon as the kept ones hold this share of the allowed mass; None: only `keep` counts.
        forced: entries [0, forced).
        allowed: bool [N]; nothing else is kept, forced or not. None: all.

    Masses are compared by `grade`. Entries of grade 0 are kept only if forced. Of equal ones the first are kept; a
    coverage budget that ends among equal ones keeps them all, within `keep`.
    """
    ok = torch.ones(mass.shape[1], dtype=torch.bool, device=mass.device) if allowed is None else allowed
    must = ok & (torch.arange(mass.shape[1], device=mass.device) < forced)
    key = torch.where(must, torch.inf, torch.where(ok, grade(mass), 0).float())
    ranked, index = key.sort(dim=1, descending=True, stable=True)
    within = torch.arange(mass.shape[1], device=mass.device) < max(keep, int(must.sum()))
    taken = within & (ranked > 0)
    if coverage is not None:
        held = torch.where(ok, mass, 0.0).gather(1, index)
        total = held.sum(1, keepdim=True)
        before = torch.cumsum(held, 1) - held
        last = torch.where(before < coverage * total, ranked, float("inf")).amin(1, keepdim=True)
        taken &= (ranked >= last) | (ranked == float("inf"))
    return torch.zeros_like(ok).repeat(len(mass), 1).scatter_(1, index, taken)


def top_buckets(mass: torch.Tensor, keep: int, coverage: float | None, forced: int) -> Bands:
    """The buckets that `top_budget` keeps of fp32 [G, NB], far to near, in lists of min(max(keep, forced), NB)."""
    kept = top_budget(mass / mass.amax(1, keepdim=True).clamp(min=1e-30), keep, coverage, forced, None)
    width = min(max(keep, forced), mass.shape[1])
    count = kept.sum(1, dtype=torch.int32)
    number = torch.arange(mass.shape[1], dtype=torch.int32, device=mass.device)
    index = torch.where(kept, number, -1).sort(dim=1, descending=True).values[:, :width]
    return Bands(index=index.contiguous(), count=count)
