"""What has been measured, in one JSON file that a second call goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_sglang.settings_file import write_whole

RECORD = "accuracy.json"
MEASURES = ("correct", "agreement", "recall", "error", "density")
SAME = ("commit", "gpu", "versions")  # of the machine: other ones make other numbers


@dataclass(kw_only=True)
class Store:
    """`cells`: one entry a task, length, depth and method, with means over its samples.

    Raises:
        ValueError: the file holds a run of another model, density, number of samples, commit or machine.
    """

    path: Path
    about: dict[str, Any]
    what: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)
    factors: dict[str, list[float]] = field(default_factory=dict)  # "method task length" -> a factor a layer
    left_out: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # that made the file, in order
    searched: dict[str, str] = field(default_factory=dict)  # settings file -> hash of its content

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        held = json.loads(self.path.read_text())
        other = [name for name in self.what if held["what"].get(name) != self.what[name]]
        other += [name for name in SAME if held["about"].get(name) != self.about.get(name)]
        if other:
            raise ValueError(
                f"{self.path} is of a run with another {', '.join(other)}: needs the same, or another --out"
            )
        self.cells, self.factors, self.searched = held["cells"], held["factors"], held["searched"]
        self.commands = [c for c in held["commands"] if c not in self.commands] + self.commands

    def searches(self, found: Mapping[str, str]) -> None:
        """Settings files by hash; ValueError if cells here were measured with other ones."""
        other = [name for name, value in found.items() if self.searched.setdefault(name, value) != value]
        if other:
            raise ValueError(f"{self.path} has cells of another {other[0]}: needs that file, or another --out")

    def find(self, task: str, length: int, depth: float, method: str) -> dict[str, Any] | None:
        key = {"task": task, "length": length, "depth": depth, "method": method}
        return next((cell for cell in self.cells if key.items() <= cell.items()), None)

    def add(
        self, task: str, length: int, depth: float, method: str, samples: list[dict[str, float]]
    ) -> None:  # fmt: skip
        """Means of one dict of MEASURES a sample."""
        cell: dict[str, Any] = {"task": task, "length": length, "depth": depth, "method": method}
        cell |= {name: sum(one[name] for one in samples) / len(samples) for name in MEASURES}
        self.cells.append(cell | {"samples": len(samples)})

    def save(self) -> None:
        content = {
            "about": self.about, "what": self.what, "commands": self.commands, "searched": self.searched,
            "left_out": self.left_out, "factors": self.factors, "cells": self.cells,
        }  # fmt: skip
        write_whole(self.path, json.dumps(content, indent=1))
