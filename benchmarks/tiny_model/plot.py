"""The learning curves of a training: loss, exact match by task, and both by tokens of a context."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

SMOOTHING = 0.95


def plot(folder: Path) -> Path:
    """Draw folder/log.jsonl as folder/learning.png; points are the validations on the test split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(2, 2, figsize=(14, 9), sharex=True)
    for column, key in enumerate(("task", "length")):
        for row, value in enumerate(("loss", "exact")):
            lines: dict[Any, list[tuple[float, float]]] = defaultdict(list)
            points: dict[Any, list[tuple[float, float]]] = defaultdict(list)
            for entry in rows:
                if value in entry and key in entry:
                    (points if entry.get("valid") else lines)[entry[key]].append((entry["seconds"] / 60, entry[value]))
            axis = axes[row, column]
            axis.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)  # there are more lengths than in tab10
            for name in sorted(lines):
                minutes, values = zip(*lines[name], strict=True)
                (line,) = axis.plot(minutes, _smooth(values), label=str(name), linewidth=1)
                if points[name]:
                    axis.scatter(*zip(*points[name], strict=True), s=12, color=line.get_color())
            axis.set_ylabel(f"{value} by {'task' if key == 'task' else 'tokens'}")
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
            axis.set_xlabel("minutes of training")
            if value == "loss":
                axis.set_yscale("log")
    figure.tight_layout()
    path = folder / "learning.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _smooth(values: tuple[float, ...]) -> list[float]:
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        out.append(mean / weight)
    return out
