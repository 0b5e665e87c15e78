"""What each family gave each head, kept in a file so that a search can be taken up again, and the choice from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_sglang.settings_file import write_whole

SLACK = 1.1  # a family may cost this much of the target
Cells = Mapping[str, Mapping[str, Any]]  # layer -> family -> what `Scores.add` holds of it
Chosen = dict[int, list[tuple[str, dict[str, Any]]]]  # layer -> for each head the family and its recipe


class Scores:
    """Sums by layer, head and family over samples, and each sample's recipes and tokens."""

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self.path = path
        self.values: dict[str, Any] = {"what": what, "tokens": [], "done": [], "cells": {}}
        if path.exists():
            try:
                held = json.loads(path.read_text(encoding="utf-8"))
                other, known = held["what"], {*self.values} == {*held}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: no search that was interrupted: delete it") from error
            if other != what or not known:
                raise ValueError(f"{path} is of another search ({other}): finish that one, or delete the file")
            self.values = held

    def tokens(self, sample: int) -> int | None:
        """Of a sample's prompt; None before its turn."""
        held: list[int] = self.values["tokens"]
        return held[sample] if sample < len(held) else None

    def begin(self, sample: int, tokens: int) -> None:
        if sample == len(self.values["tokens"]):
            self.values["tokens"].append(tokens)

    def done(self, sample: int, layer: int) -> bool:
        return [sample, layer] in self.values["done"]

    def add(self, sample: int, layer: int, cells: dict[str, list[list[float]]], recipes: dict[str, Any]) -> None:
        """cells: family -> [H] of (squared error over the output's, density), so that prompts count alike."""
        entry = self.values["cells"].setdefault(str(layer), {})
        for family, heads in cells.items():
            held = entry.setdefault(family, {"sums": [[0.0] * len(head) for head in heads], "recipes": []})
            held["sums"] = [
                [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(held["sums"], heads, strict=True)
            ]
            held["recipes"].append(recipes[family])
        self.values["done"].append([sample, layer])
        write_whole(self.path, json.dumps(self.values))

    @property
    def longest(self) -> int:
        """The sample with most tokens: its budgets are the ones that are written, since a short one's starve it."""
        held: list[int] = self.values["tokens"]
        return max(range(len(held)), key=lambda sample: held[sample])


def affordable(entry: Mapping[str, Any], target: float) -> list[str]:
    """Families of a layer that kept to the target on average; if their fixed parts let none, the cheapest one."""
    cost = {
        f: sum(cell[1] for cell in held["sums"]) / len(held["sums"]) / len(held["recipes"]) for f, held in entry.items()
    }
    kept = [f for f, value in cost.items() if value <= SLACK * target]
    return kept or [min(cost, key=lambda f: cost[f])]


def too_dear(cells: Cells, target: float) -> list[str]:
    """Families that no layer could afford with their smallest budgets: of a short prompt a few tiles are 10%."""
    every = {f for entry in cells.values() for f in entry}
    return sorted(every - {f for entry in cells.values() for f in affordable(entry, target)})


def choose(cells: Cells, heads: int, target: float, sample: int) -> Chosen:
    """Each head's family of least squared error in the mean over samples, with its recipe for one of them."""
    layers: Chosen = {}
    for layer in sorted(cells, key=int):
        entry = cells[layer]
        families = affordable(entry, target)
        own = []
        for head in range(heads):
            error = {f: entry[f]["sums"][head][0] for f in families}
            best = min(error, key=lambda f: error[f])
            own.append((best, entry[best]["recipes"][sample]))
        layers[int(layer)] = own
    return layers
