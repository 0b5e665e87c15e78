"""`mm-sglang search`: patterns and budgets that change a layer's attention output least, at one cost of the layer.

MMInference's algorithm 4 with its faults mended: costs are tiles counted on the prompt itself, heads of a layer share
what it may cost by what they make of it, the objective is the error of the attention output relative to its norm,
several samples count alike, and an interrupted search goes on where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mm_sglang.choice import choose_engine
from mm_sglang.config import SparseConfig
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.model_hash import model_hash
from mm_sglang.search.allocate import allocate
from mm_sglang.search.candidates import FAMILIES, at_density, density_by_head, family_of, options
from mm_sglang.search.capture import Captured
from mm_sglang.search.exact import Exact
from mm_sglang.search.maps import layer_curve, layer_maps, write_maps
from mm_sglang.settings_file import settings_of, write_settings, write_whole

LEAST_TOKENS = 1024
SLACK = 1.1  # where fixed parts leave no choice at the target: this much of what the cheapest options cost
FORM = "relative error, recall, density of family @ level"  # of Scores' cells: what another version wrote is refused
EVERY = tuple(FAMILIES)
Prompt = Callable[
    [], tuple[Mapping[str, torch.Tensor], TokenLayout]
]  # made when its turn comes; inputs as Captured.run


class Scores:
    """Sums by layer, option and head, kept in a file beside the result so that a search can be taken up again."""

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"form": FORM, "what": what, "done": [], "cells": {}}
        if path.exists():
            held = json.loads(path.read_text())
            if held.get("form") != FORM:
                raise ValueError(
                    f"{path} was begun by another version of the search: needs to be deleted, to begin anew"
                )
            if held["what"] != what:
                raise ValueError(f"{path} is of another search ({held['what']}): finish that one, or delete the file")
            self.values = held

    def done(self, sample: int, layer: int) -> bool:
        return [sample, layer] in self.values["done"]

    def add(self, sample: int, layer: int, cells: dict[str, list[list[float]]], recipes: dict[str, Any]) -> None:
        """cells: option -> [H] of (relative squared error, recall, density)."""
        entry = self.values["cells"].setdefault(str(layer), {})
        for option, heads in cells.items():
            held = entry.setdefault(option, {"sums": [[0.0] * 3 for _ in heads], "recipes": [], "samples": 0})
            held["sums"] = [
                [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(held["sums"], heads, strict=True)
            ]
            held["recipes"].append(recipes[option])
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
    content = choose(scores.values["cells"], target, told)
    for path, some in (fewer or {}).items():
        own = {
            layer: {option: entry[option] for option in entry if family_of(option) in some}
            for layer, entry in scores.values["cells"].items()
        }  # fmt: skip
        write_settings(path, choose(own, target, {**told, "families": list(some)}))
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
    """Each family at several densities: options' (relative squared error, recall, density) by head, and recipes."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    heads = q.shape[1]
    exact = Exact(q, k, v, scale, engine.ops())
    norm = exact.norm().clamp(min=1e-30)
    cells: dict[str, list[list[float]]] = {}
    recipes: dict[str, Any] = {}
    tries: dict[str, HeadPattern] = {}
    for family in families:
        tries |= options(family, target, at_density(family, target, q, k, layout, scale, engine.ops()))
    for option, pattern in tries.items():
        out, lse, plan = sparse_prefill(q, k, v, layout=layout, patterns=[pattern] * heads, scale=scale, engine=engine)
        cost = density_by_head(plan)
        error, share = (exact.error(out) / norm).tolist(), exact.recall(lse).tolist()
        cells[option] = [list(cell) for cell in zip(error, share, cost, strict=True)]
        recipes[option] = pattern.to_dict()
    return cells, recipes


def choose(cells: dict[str, Any], target: float, provenance: dict[str, Any]) -> dict[str, Any]:
    """The settings: in each layer the options of least squared error, summed over heads and samples, that keep to the
    target (or SLACK) on average over heads and samples, with their budgets at the last sample.
    """
    layers: dict[int, Any] = {}
    report: dict[int, Any] = {}
    for layer in sorted(cells, key=int):
        samples = max(held["samples"] for held in cells[layer].values())
        entry = {option: held for option, held in cells[layer].items() if held["samples"] == samples}
        mean = np.array([held["sums"] for held in entry.values()]).transpose(1, 0, 2) / samples  # [H, options, 3]
        chosen, told = {}, {}
        budget = max(target, SLACK * float(mean[..., 2].min(1).mean()))
        for head, number in enumerate(allocate(mean[..., 2], mean[..., 0], budget)):
            option, (error, share, density) = list(entry)[number], mean[head, number].tolist()
            chosen[head] = entry[option]["recipes"][-1]
            told[head] = {
                "family": family_of(option), "error": round(math.sqrt(error), 4), "recall": round(share, 4),
                "density": round(density, 4),
            }  # fmt: skip
        layers[int(layer)] = {"heads": chosen}
        report[int(layer)] = told
    return settings_of(layers, {"source": "mm-sglang search", **provenance, "heads": report})
