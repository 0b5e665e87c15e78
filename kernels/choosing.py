"""`auto`: which of several recipes holds most of each head's attention in this prompt, all at one cost.

A few tiles of queries, spread over the chunk, run through the engine that will run the rest: once with every key, and
once with what each candidate plans for them. Recall is the ratio of their log-sum-exps, so nothing here is an estimate
but the sample itself; the plans are those of the whole chunk, so the sample can't flatter them.

Legend: C candidates, H query heads, Nq queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mm_sglang.kernels import classes
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.inspection import recall
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import (
    AShape,
    BlockTopK,
    Boundary,
    ColumnBlocks,
    Dense,
    Grid,
    HeadPattern,
    VerticalSlash,
)
from mm_sglang.kernels.plan import TILE, Plan
from mm_sglang.kernels.sampling import Sample

ROUNDS = 3  # of bringing the candidates to one cost, each of which waits once for the device
AIM, CLOSE, SLACK = 0.95, 0.85, 1.1  # of the target: aimed at; near enough to stop; the most of one that may be chosen


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One recipe a head, and what was known of it: recall of the sampled queries and share of dense tiles, [H] each."""

    recipes: tuple[HeadPattern, ...]
    recall: tuple[float, ...]
    density: tuple[float, ...]


def choose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    candidates: Sequence[HeadPattern],
    density: float,
    scale: float,
    engine: Engine,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    tail: int = 0,
    learnt: dict[HeadPattern, float] | None = None,
) -> Choice:
    """The candidate of best recall for each head, with budgets at which all compute `density` of the dense tiles.

    Waits for the device, ROUNDS + 1 times at most. It plans each candidate up to ROUNDS times and attends 8 tiles
    of queries for each of them and for dense attention.

    Args:
        q, k, v, layout, scale, engine, slots: as for `sparse_prefill`.
        candidates: recipes whose budgets are scaled together; those that the layout gives no sense are left out.
        density: share of dense attention's tiles, of all heads together, the tail's included.
        out: scratch [Nq, H, D] in q's dtype, overwritten; None: new memory.
        tail: of `sparse_prefill`; what it costs, the recipes have less. They keep half of the density in any case.
        learnt: by candidate, the budgets that came to the density over those first guessed; used, and kept up to date.
            What a recipe costs differs little from layer to layer, so with it most layers need one round.

    Raises:
        ValueError: no candidate is left, or what `sparse_prefill` raises.
    """
    fitting = [c for c in candidates if _has_sense(c, layout)]
    if not fitting:
        raise ValueError(f"candidates={list(candidates)}: needs at least one for this layout")
    engine.check(q)
    sample = Sample(q, k, v, layout, scale, engine, slots, torch.empty_like(q) if out is None else out)
    most = max(density - sample.tail_cost(tail), density / 2)
    tries = _balanced(sample, fitting, most, {} if learnt is None else learnt)
    affordable = [t for t in tries if t.cost <= SLACK * most] or [min(tries, key=lambda t: t.cost)]
    dense = sample.lse(sample.plan(Dense()))
    held = torch.stack([recall(sample.lse(t.plan), dense) for t in affordable]).cpu()  # [C, H]
    best = _best(held, torch.tensor([t.by_head for t in affordable]), most)
    return Choice(
        recipes=tuple(affordable[c].pattern for c in best),
        recall=tuple(float(held[c, h]) for h, c in enumerate(best)),
        density=tuple(affordable[c].by_head[h] for h, c in enumerate(best)),
    )


def for_chunk(pattern: HeadPattern, then: tuple[int, int], now: tuple[int, int]) -> HeadPattern:
    """The recipe chosen for an earlier chunk at about the same density in a later one.

    Columns grow with the keys; what is kept of a query's own (diagonals, blocks) with the mean number of keys that a
    query sees; lines a frame stay.

    Args:
        then, now: (prefix, keys) of the chunks.
    """
    if isinstance(pattern, Boundary):
        return replace(pattern, recipes=tuple((name, for_chunk(r, then, now)) for name, r in pattern.recipes))
    grown = pattern.scaled(sum(now) / sum(then))
    if isinstance(pattern, VerticalSlash | ColumnBlocks) and isinstance(grown, VerticalSlash | ColumnBlocks):
        return replace(grown, columns=max(1, round(pattern.columns * now[1] / then[1])))
    if isinstance(pattern, Grid) and isinstance(grown, Grid):
        return replace(grown, lines=pattern.lines)
    return grown


@dataclass(frozen=True, kw_only=True)
class _Try:
    """A candidate with some budgets, their plan, and its share of dense tiles by head."""

    pattern: HeadPattern
    factor: float
    plan: Plan
    by_head: list[float]

    @property
    def cost(self) -> float:
        return max(sum(self.by_head) / len(self.by_head), 1e-6)


def _balanced(
    sample: Sample, candidates: Sequence[HeadPattern], density: float, learnt: dict[HeadPattern, float]
) -> list[_Try]:
    """Each candidate's try nearest to the target, from below if any is: secants in logarithms of budget and cost."""
    best: dict[int, _Try] = {}  # of the others' plans nothing is kept: they are long at a million tokens
    past: list[list[tuple[float, float]]] = [[] for _ in candidates]  # (factor, cost)
    guess = [AIM * density * sample.layout.length / _tokens(candidate) for candidate in candidates]
    for _ in range(ROUNDS):
        still = [n for n, held in enumerate(past) if not held or not CLOSE * density <= held[-1][1] <= density]
        made = []
        for n in still:
            factor = _next(past[n], density) if past[n] else guess[n] * learnt.get(candidates[n], 1.0)
            pattern = candidates[n].scaled(factor)
            made.append((n, factor, pattern, sample.plan(pattern)))
        costs = torch.stack([sample.cost(plan) for *_, plan in made]).tolist() if made else []  # a round's one wait
        for (n, factor, pattern, plan), by_head in zip(made, costs, strict=True):
            new = _Try(pattern=pattern, factor=factor, plan=plan, by_head=by_head)
            past[n].append((factor, new.cost))
            if n not in best or _distance(new, density) < _distance(best[n], density):
                best[n] = new
    learnt.update((candidates[n], tried.factor / guess[n]) for n, tried in best.items() if tried.cost <= density)
    return [best[n] for n in range(len(candidates))]


def _distance(tried: _Try, density: float) -> float:
    """How far a try is from the target; one above it is further than any below."""
    return density - tried.cost if tried.cost <= density else 1.0 + tried.cost


def _next(past: list[tuple[float, float]], density: float) -> float:
    """The factor to try after those tried."""
    factor, cost = past[-1]
    slope: float = 1.0
    if len(past) > 1 and past[-2][0] != factor:
        slope = math.log(cost / past[-2][1]) / math.log(factor / past[-2][0])
        slope = min(max(slope, 0.3), 2.0)
    step: float = (AIM * density / cost) ** (1 / slope)
    return factor * min(max(step, 1 / 64), 64.0)


def _tokens(pattern: HeadPattern) -> float:
    """About density times keys of a recipe: a start for the search, which corrects it.

    A key kept for all queries costs one; one kept at a distance two, as early queries see fewer keys, and a diagonal
    about twice that, since tiles bring neighbours.
    """
    if isinstance(pattern, Boundary):
        return max(_tokens(recipe) for _, recipe in pattern.recipes)
    if isinstance(pattern, VerticalSlash):
        return pattern.columns + 4.0 * pattern.slashes
    if isinstance(pattern, BlockTopK):
        return 2.0 * TILE * pattern.blocks
    if isinstance(pattern, ColumnBlocks):
        return pattern.columns + 2.0 * TILE * pattern.blocks
    return 2.0 * pattern.local if isinstance(pattern, AShape | Grid) else 1.0


def _best(held: torch.Tensor, cost: torch.Tensor, most: float) -> list[int]:
    """By head the candidate of greatest recall, at a price for cost so low that the mean cost is `most` at most.

    Each candidate keeps to the density over all heads together, but a head takes the one that costs most for it, where
    more tiles hold more. Without a price, still the cheapest of equal recall.

    Args:
        held, cost: recall and share of dense tiles, [C, H].
    """
    held = held.round(decimals=3)
    for price in (1e-3 * 1.5**step for step in range(40)):  # up to where recall counts for nothing
        best = (held - price * cost).argmax(0)
        if cost.gather(0, best[None]).mean() <= most:
            break
    chosen: list[int] = best.tolist()
    return chosen


def _has_sense(pattern: HeadPattern, layout: TokenLayout) -> bool:
    """Whether there is what the recipe tells apart: frames for a grid, text and vision for a boundary."""
    vision = classes.count(layout, "vision", 0, layout.length)
    if isinstance(pattern, Boundary):
        inside = all(_has_sense(recipe, layout) for _, recipe in pattern.recipes)
        return inside and 0 < vision < layout.length
    return vision > 0 or not isinstance(pattern, Grid)
