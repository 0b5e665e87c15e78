"""`mm-sglang search`: for each head the pattern that changes attention's output least, all at one cost.

MMInference's algorithm 4 with its faults mended: candidates cost the same number of tiles on the prompt itself, the
objective is the error of the attention output, several samples count, and an interrupted search goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mm_sglang.choice import choose_engine
from mm_sglang.config import SparseConfig
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.model_hash import model_hash
from mm_sglang.search.candidates import FAMILIES, at_density, density_by_head
from mm_sglang.search.capture import Captured
from mm_sglang.search.exact import Exact
from mm_sglang.search.maps import layer_curve, layer_maps, write_maps
from mm_sglang.settings_file import settings_of, write_settings, write_whole

LEAST_TOKENS = 1024
SLACK = 1.1  # a family may cost this much of the target
EVERY = tuple(FAMILIES)
Prompt = Callable[
    [], tuple[Mapping[str, torch.Tensor], TokenLayout]
]  # made when its turn comes; inputs as Captured.run


class Scores:
    """Sums by layer, head and family, kept in a file beside the result so that a search can be taken up again."""

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"what": what, "done": [], "cells": {}}
        if path.exists():
            held = json.loads(path.read_text())
            if held["what"] != what:
                raise ValueError(f"{path} is of another search ({held['what']}): finish that one, or delete the file")
            self.values = held

    def done(self, sample: int, layer: int) -> bool:
        return [sample, layer] in self.values["done"]

    def add(self, sample: int, layer: int, cells: dict[str, list[list[float]]], recipes: dict[str, Any]) -> None:
        """cells: family -> [H] of (squared error, squared norm, recall, density)."""
        entry = self.values["cells"].setdefault(str(layer), {})
        for family, heads in cells.items():
            held = entry.setdefault(family, {"sums": [[0.0] * 4 for _ in heads], "recipes": [], "samples": 0})
            held["sums"] = [
                [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(held["sums"], heads, strict=True)
            ]
            held["recipes"].append(recipes[family])
            held["samples"] += 1
        self.values["done"].append([sample, layer])
        write_whole(self.path, json.dumps(self.values))


def search(
    model: str, videos: Sequence[Path], out: Path, *, target: float, device: str, families: Sequence[str] = EVERY
) -> dict[str, Any]:
    """Search on videos, write `out` (YAML that a server loads) and return its content.

    Args:
        target: share of dense attention's tiles; families: names of FAMILIES that may be chosen.

    Raises:
        ValueError: an unknown architecture or family, a video that is missing or too short, a target that is no share,
            or an interrupted search of something else under the same name.
    """
    _check(target, families)  # before a model is loaded
    if not videos:
        raise ValueError("--videos: needs at least one")
    held = Captured(model, device)
    prompts: dict[str, Prompt] = {video.name: partial(held.prompt, video) for video in videos}
    return search_prompts(held, prompts, out, target=target, families=families)


def search_prompts(
    held: Captured, prompts: Mapping[str, Prompt], out: Path, *, target: float, families: Sequence[str] = EVERY,
    fewer: Mapping[Path, Sequence[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The same on prompts of any making, by name.

    Args:
        held: from `Captured(model, device)`.
        fewer: further files, each chosen from some of `families` by the same scores.

    Raises:
        ValueError: as `search`.
    """
    _check(target, families)
    what = {
        "model_hash": model_hash(held.folder), "videos": list(prompts), "density": target, "families": list(families)
    }  # fmt: skip
    scores = Scores(out.with_name(out.name + ".partial"), what)
    engine, tokens = choose_engine("auto", held.device), []
    with tqdm(total=len(prompts) * held.layers, desc="search", unit="layer") as progress:
        for number, (name, make) in enumerate(prompts.items()):
            inputs, layout = make()
            if layout.length < LEAST_TOKENS:
                raise ValueError(f"{name}: gives {layout.length} tokens: needs at least {LEAST_TOKENS}")
            tokens.append(layout.length)

            def look(
                layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, number: int = number,
                layout: TokenLayout = layout,
            ) -> None:  # fmt: skip
                if not scores.done(number, layer):
                    cells, recipes = layer_scores(q, k, v, scale, layout, target, engine, families)
                    scores.add(number, layer, cells, recipes)
                progress.update()

            held.run(inputs, look)
    told = {**what, "tokens": tokens, "model": Path(held.folder).name}
    content = choose(scores.values["cells"], held.heads, target, told)
    for path, some in (fewer or {}).items():
        own = {
            layer: {f: entry[f] for f in families if f in some} for layer, entry in scores.values["cells"].items()
        }  # fmt: skip
        write_settings(path, choose(own, held.heads, target, {**told, "families": list(some)}))
    write_settings(out, content)
    scores.path.unlink()
    _look_again(held, next(iter(prompts.values())), out, engine)
    return content


def _look_again(held: Captured, make: Prompt, out: Path, engine: Any) -> None:
    """Maps and curve of what was chosen, on the first prompt, for the report."""
    config, maps, curves = SparseConfig.from_yaml(out), {}, []
    inputs, layout = make()
    with tqdm(total=held.layers, desc="maps for the report", unit="layer") as progress:

        def look(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
            q, k, v = (x.contiguous() for x in (q, k, v))
            patterns = config.patterns(layer, held.heads)
            if patterns is not None:
                maps[layer] = layer_maps(q, k, layout, patterns, scale, engine)
                curves.append(layer_curve(q, k, v, layout, patterns, scale, engine))
            progress.update()

        held.run(inputs, look)
    write_maps(out, maps, curves, layout)


def _check(target: float, families: Sequence[str]) -> None:
    if not 0 < target < 1:
        raise ValueError(f"--density {target}: needs a share between 0 and 1")
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"--families {unknown[0] if unknown else ''!r}: needs some of {EVERY}")


def layer_scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, layout: TokenLayout, target: float, engine: Any,
    families: Sequence[str] = EVERY,
) -> tuple[dict[str, list[list[float]]], dict[str, Any]]:  # fmt: skip
    """Each family at the target density: (squared error, squared norm, recall, density) by head, and its recipe."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    heads = q.shape[1]
    exact = Exact(q, k, v, scale, engine.ops())
    norm = exact.norm().tolist()
    cells: dict[str, list[list[float]]] = {}
    recipes: dict[str, Any] = {}
    for family in families:
        pattern: HeadPattern = at_density(family, target, q, k, layout, scale, engine.ops())
        out, lse, plan = sparse_prefill(q, k, v, layout=layout, patterns=[pattern] * heads, scale=scale, engine=engine)
        error, share = exact.error(out).tolist(), exact.recall(lse).tolist()
        cells[family] = [list(cell) for cell in zip(error, norm, share, density_by_head(plan), strict=True)]
        recipes[family] = pattern.to_dict()
    return cells, recipes


def affordable(entry: dict[str, Any], target: float) -> list[str]:
    """Families of a layer that kept to the target on average; if their fixed parts let none, the cheapest one."""
    cost = {f: sum(cell[3] for cell in held["sums"]) / len(held["sums"]) / held["samples"] for f, held in entry.items()}
    kept = [f for f, value in cost.items() if value <= SLACK * target]
    return kept or [min(cost, key=lambda f: cost[f])]


def choose(cells: dict[str, Any], heads: int, target: float, provenance: dict[str, Any]) -> dict[str, Any]:
    """The settings: each head's family of least output error over all samples, with its budgets at the last one."""
    layers: dict[int, Any] = {}
    report: dict[int, Any] = {}
    for layer in sorted(cells, key=int):
        entry, chosen, told = cells[layer], {}, {}
        families = affordable(entry, target)
        for head in range(heads):
            sums = {f: entry[f]["sums"][head] for f in families}
            error = {f: math.sqrt(sums[f][0] / max(sums[f][1], 1e-30)) for f in families}
            best = min(error, key=lambda f: error[f])
            held = entry[best]
            chosen[head] = held["recipes"][-1]
            share, density = (total / held["samples"] for total in held["sums"][head][2:])
            told[head] = {
                "family": best, "error": round(error[best], 4), "recall": round(share, 4), "density": round(density, 4)
            }  # fmt: skip
        layers[int(layer)] = {"heads": chosen}
        report[int(layer)] = told
    return settings_of(layers, {"source": "mm-sglang search", **provenance, "heads": report})
