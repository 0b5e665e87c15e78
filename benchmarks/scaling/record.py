"""The file of runs, which calls for other numbers of GPUs, lengths and contestants add to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def take_up(out: Path, about: dict[str, Any], layers: int) -> dict[str, Any]:
    """The record to go on with: what `out` holds if it is of this GPU, commit and number of layers.

    Any other file there is kept under a name of its own, for rows that differ in these don't compare.
    """
    record: dict[str, Any] = {"about": about, "layers": layers, "runs": []}
    if not out.exists():
        return record
    held = json.loads(out.read_text())
    was = held["about"]
    if (was["gpu"], was["commit"], held["layers"]) == (about["gpu"], about["commit"], layers):
        return record | {"runs": held["runs"]}
    stem, number = f"{out.stem}-{was['commit']}-{held['layers']}", 1
    while (free := out.with_stem(stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    out.rename(free)
    return record


def with_run(runs: list[Run], new: Run) -> list[Run]:
    """`runs` and this one, in the place of an earlier one of its kind unless it has no figure and that one has."""
    others = [run for run in runs if _kind(run) != _kind(new)]
    same = [run for run in runs if _kind(run) == _kind(new)]
    return others + (same if same and same[0]["ttft"] and not new["ttft"] else [new])


def _kind(run: Run) -> tuple[Any, ...]:
    return run["gpus"], run["chunk"], run["name"], run.get("lengths")
