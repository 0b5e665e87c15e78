"""Several runs' records as one: tasks, lengths or methods that were measured by processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.store import RECORD, SAME
from mm_sglang.settings_file import write_whole

OF_ALL = ("model", "model_hash", "density", "config")  # samples may differ: each cell says how many it has


def merge(folders: Sequence[Path]) -> dict[str, Any]:
    """One record of several folders' on one machine; a cell that several have counts once, that of most samples.

    Raises:
        ValueError: records of another model, density, machine, commit or searched patterns.
    """
    records = [json.loads((folder / RECORD).read_text(encoding="utf-8")) for folder in folders]
    first = records[0]
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    searched: dict[str, str] = {}
    for folder, record in zip(folders, records, strict=True):
        other = [name for name in OF_ALL if record["what"].get(name) != first["what"].get(name)]
        other += [name for name in SAME if record["about"].get(name) != first["about"].get(name)]
        searched_too = record.get("searched", {})
        other += [name for name in searched_too if searched.setdefault(name, searched_too[name]) != searched_too[name]]
        if other:
            raise ValueError(f"--merge {folder}: another {', '.join(other)} than {folders[0]}: needs the same")
        for cell in record["cells"]:
            key = tuple(cell[name] for name in ("task", "length", "depth", "method"))
            if key not in cells or cells[key]["samples"] < cell["samples"]:
                cells[key] = cell
    samples = sorted({cell["samples"] for cell in cells.values()})
    about = first["about"] | {"searched": "; ".join(dict.fromkeys(r["about"]["searched"] for r in records))}
    return {
        "about": about, "what": first["what"] | {"samples": samples[0] if len(samples) == 1 else samples},
        "commands": [command for record in records for command in record.get("commands", [])],
        "searched": searched, "left_out": [left for record in records for left in record["left_out"]],
        "factors": {name: factors for record in records for name, factors in record["factors"].items()},
        "cells": list(cells.values()),
    }  # fmt: skip


def write_merged(folders: Sequence[Path], record: dict[str, Any], out: Path) -> None:
    """The record, and beside it the searched settings that it speaks of."""
    write_whole(out / RECORD, json.dumps(record, indent=1))
    for name in record["searched"]:
        held = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if held is not None and held.resolve() != (out / name).resolve():
            shutil.copyfile(held, out / name)
