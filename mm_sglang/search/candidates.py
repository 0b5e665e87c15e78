"""What the search chooses from, each brought to the same cost: tiles computed, counted on the prompt itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mm_sglang.kernels.inspection import density, tiles_by_head
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import Ops
from mm_sglang.kernels.patterns import HeadPattern, head_pattern
from mm_sglang.kernels.plan import Plan
from mm_sglang.kernels.prefill import make_plan

SLASH: dict[str, Any] = {"pattern": "vertical_slash", "columns": 1000, "slashes": 2048}
COLUMNS: dict[str, Any] = {"pattern": "vertical_slash", "columns": 2000, "slashes": 256}
FRAME: dict[str, Any] = {"pattern": "grid", "stride": "frame", "lines": 4, "horizontal": False}
ROW: dict[str, Any] = {"pattern": "grid", "stride": "row", "lines": 8, "horizontal": False}
# Intra-modality patterns, then the boundaries round the two that profit (MMInference, algorithm 4 and table 4).
FAMILIES: dict[str, dict[str, Any]] = {
    "a_shape": {"pattern": "a_shape", "sink": 128, "local": 2048},
    "vertical_slash": SLASH,
    "columns": COLUMNS,
    "grid frame": FRAME,
    "grid frame, both lines": FRAME | {"horizontal": True},
    "grid row": ROW,
    "block_topk": {"pattern": "block_topk", "blocks": 64, "least": 0.1, "score": "clusters"},
    "columns and blocks": {"pattern": "column_blocks", "columns": 1000, "blocks": 16},
    "k vertical_slash": SLASH | {"boundary": "k"},
    "q vertical_slash": SLASH | {"boundary": "q"},
    "q grid frame": FRAME | {"boundary": "q"},
    "2d vertical_slash": SLASH | {"boundary": "2d"},
}
STEPS, REACH = 7, 6.0  # of bisection for a family's budgets, over a factor of 2^-6 to 2^6


def at_density(
    family: str, target: float, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, scale: float, ops: Ops,
    tail: int = 0,
) -> HeadPattern:  # fmt: skip
    """The family's recipe with budgets so large that all heads together compute about `target` of the causal tiles.

    Args:
        q: [Nq, H, D], k: [Nk, Hkv, D] of a layer; target: share of dense attention's tiles; tail: of `make_plan`, whose
            tiles count.
    """
    base = head_pattern(FAMILIES[family])

    def of(factor: float) -> float:
        patterns = [base.scaled(factor)] * q.shape[1]
        return density(make_plan(q, k, layout=layout, patterns=patterns, scale=scale, ops=ops, tail=tail))

    return base.scaled(largest_factor(of, target, STEPS, REACH))


def largest_factor(density_of: Callable[[float], float], target: float, steps: int, reach: float) -> float:
    """The largest factor on budgets found whose density keeps to the target; the smallest one if none does.

    Args:
        density_of: a factor's density, growing with it; steps: of bisection, over factors 2^-reach to 2^reach.
    """
    low, high = -reach, reach
    for _ in range(steps):
        middle = (low + high) / 2
        if density_of(2.0**middle) <= target:
            low = middle
        else:
            high = middle
    return float(2.0**low)


def density_by_head(plan: Plan) -> list[float]:
    """Each head's own density, of a plan whose heads share one recipe."""
    return [count / plan.causal_tiles for count in tiles_by_head(plan)]
