"""A layer's tiles shared out among its heads: one option for each, of least loss together, at a mean cost.

Heads differ: at a tenth of dense attention's tiles some have no error left, others half of their output. What the
first can spare is worth more at the second.

Legend: H heads, O options of each (a family of patterns with some budgets).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

STEPS = 256  # a head's mean share of the budget in steps, to which costs are rounded up: 1/256 of it is lost at most


def allocate(cost: npt.ArrayLike, loss: npt.ArrayLike, target: float) -> list[int]:
    """The option of each head: the least sum of losses whose mean cost keeps to the target, by dynamic programming.

    Exact but for the rounding, where a Lagrangian over convex hulls misses what lies above them.

    Args:
        cost: [H, O], above 0; loss: [H, O]; target: mean cost over heads, above 0.

    Returns:
        [H] option numbers.

    Raises:
        ValueError: shapes other than two equal [H, O], or a target under (or by less than 1 / STEPS above) the mean
            of the cheapest options.
    """
    costs, losses = np.asarray(cost, dtype=float), np.asarray(loss, dtype=float)
    if costs.ndim != 2 or costs.shape != losses.shape or not costs.size:
        raise ValueError(f"cost {costs.shape}, loss {losses.shape}: needs [H, O] of both, with an option at least")
    steps = np.ceil(costs / target * STEPS - 1e-9).astype(int)
    budget = STEPS * len(costs)
    least = np.zeros(budget + 1)  # by steps spent at most: loss of the heads so far
    picks = []
    for own_steps, own_losses in zip(steps, losses, strict=True):
        tried = np.full((len(own_steps), budget + 1), np.inf)
        for option, (step, value) in enumerate(zip(own_steps, own_losses, strict=True)):
            if step <= budget:
                tried[option, step:] = least[: budget + 1 - step] + value
        picks.append(tried.argmin(0))
        least = tried.min(0)
    if np.isinf(least[budget]):
        raise ValueError(f"target {target}: needs at least {(1 + 1 / STEPS) * costs.min(1).mean():.4g} for these costs")
    chosen, left = [], budget
    for pick, own_steps in zip(reversed(picks), reversed(steps), strict=True):
        chosen.append(int(pick[left]))
        left -= own_steps[chosen[-1]]
    return chosen[::-1]
