"""The last step of a search: each layer's chosen recipes brought to the density together, and what they then give.

Heads choose from families that keep to the density over all of a layer's heads. A head tends to choose the family that
computes most for it, so a layer's choice costs more, or less, than what was asked for: its budgets are scaled by one
factor, on the prompt that they are for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mm_sglang.config import TEXT_TAIL
from mm_sglang.kernels.inspection import density, tiles_by_head
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern, head_pattern
from mm_sglang.kernels.prefill import make_plan, sparse_prefill
from mm_sglang.search.candidates import largest_factor
from mm_sglang.search.capture import Captured
from mm_sglang.search.exact import Exact
from mm_sglang.search.scores import Chosen
from mm_sglang.settings_file import settings_of

STEPS, REACH = 6, 1.0  # of bisection, over half to twice the budgets
Prompt = tuple[Mapping[str, torch.Tensor], TokenLayout]


def settle(
    held: Captured, prompt: Prompt, choices: Mapping[Path, Chosen], target: float, engine: Any,
    each_layer: Callable[[], None],
) -> dict[Path, tuple[dict[int, Any], dict[int, Any]]]:  # fmt: skip
    """For each file its layers as SparseConfig takes them, and family, error, recall and density by head."""
    inputs, layout = prompt
    found: dict[Path, tuple[dict[int, Any], dict[int, Any]]] = {path: ({}, {}) for path in choices}
    with tqdm(total=held.layers, desc="budgets of the choice", unit="layer") as progress:

        def look(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
            each_layer()
            q, k, v = (x.contiguous() for x in (q, k, v))
            exact = Exact(q, k, v, scale, engine.ops())
            for path, chosen in choices.items():
                recipes = [head_pattern(recipe) for _, recipe in chosen[layer]]
                recipes = balanced(recipes, target, q, k, layout, scale, engine)
                out, lse, plan = sparse_prefill(
                    q, k, v, layout=layout, patterns=recipes, scale=scale, engine=engine, tail=TEXT_TAIL
                )
                share = [tiles / plan.causal_tiles for tiles in tiles_by_head(plan)]
                wrong = (exact.error(out) / exact.norm().clamp(min=1e-30)).sqrt().tolist()
                figures = zip(chosen[layer], wrong, exact.recall(lse).tolist(), share, strict=True)
                layers, told = found[path]
                layers[layer] = {"heads": {head: recipe.to_dict() for head, recipe in enumerate(recipes)}}
                told[layer] = {
                    head: {"family": family, "error": round(e, 4), "recall": round(r, 4), "density": round(d, 4)}
                    for head, ((family, _), e, r, d) in enumerate(figures)
                }
            progress.update()

        held.run(inputs, look)
    return found


def balanced(
    recipes: list[HeadPattern], target: float, q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, scale: float,
    engine: Any,
) -> list[HeadPattern]:  # fmt: skip
    """A layer's recipes with budgets at which all heads together compute `target` of the causal tiles at most."""

    def of(factor: float) -> float:
        patterns = [recipe.scaled(factor) for recipe in recipes]
        return density(make_plan(q, k, layout=layout, patterns=patterns, scale=scale, ops=engine.ops(), tail=TEXT_TAIL))

    factor = largest_factor(of, target, STEPS, REACH)
    return [recipe.scaled(factor) for recipe in recipes]


def content(found: tuple[dict[int, Any], dict[int, Any]], provenance: dict[str, Any]) -> dict[str, Any]:
    """The settings file's mapping."""
    layers, told = found
    return settings_of(layers, {"source": "mm-sglang search", **provenance, "heads": told})
