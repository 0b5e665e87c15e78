"""The table and the heat maps of a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import METHODS, NOTES

K = 1024
GROUPS = {
    "v_niah": ("v_niah",), "mm_niah": ("mm_niah",), "whole video": ("tracking", "order", "counting", "caption"),
}  # fmt: skip
Cells = Sequence[dict[str, Any]]


def mean(cells: Cells, measure: str) -> float | None:
    """Over cells, each as much as another; None without any."""
    return sum(cell[measure] for cell in cells) / len(cells) if cells else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _block(
    title: str, cells: Cells, names: Sequence[Any], heads: Sequence[str], pick: Callable[[dict[str, Any], Any], bool],
    measure: str, form: str,
) -> list[str]:  # fmt: skip
    lines = ["", title, f"{'':22}" + "".join(f"{head:>10}" for head in [*heads, "mean"])]
    for method in methods_of(cells):
        own = [cell for cell in cells if cell["method"] == method]
        values = [mean([cell for cell in own if pick(cell, name)], measure) for name in names]
        shown = [*values, mean(own, measure)]
        lines.append(f"{method:22}" + "".join(f"{_shown(value, form):>10}" for value in shown))
    return lines


def methods_of(cells: Cells) -> list[str]:
    """Methods with a cell, in METHODS' order."""
    present = {cell["method"] for cell in cells}
    return [method for method in METHODS if method in present]


def table(record: dict[str, Any]) -> str:
    """Every measure by length, accuracy by task too, and what the methods are."""
    cells, what = record["cells"], record["what"]
    lengths = sorted({cell["length"] for cell in cells})
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    heads = [f"{n / K:.4g}K" for n in lengths]

    def at(cell: dict[str, Any], length: int) -> bool:
        return bool(cell["length"] == length)

    samples = sum(cell["samples"] for cell in cells if cell["method"] == "dense")
    lines = [
        f"{what['model']} ({what['model_hash']}), {samples} test prompts, on {record['about']['gpu']}",
        f"Budgets of every layer: bisected to at most {what['density']:.0%} of dense attention's tiles of 128 x 128, "
        "on a training prompt",
        "of the same task and length; auto sets its own. Short prompts can't come under what a method keeps anyway.",
        f"Searched patterns: {record['about']['searched']}.",
    ]
    lines += _block("Exact match by length, %", cells, lengths, heads, at, "correct", "{:.1%}")
    lines += _block(
        "Exact match by task, %", cells, tasks, tasks, lambda cell, task: bool(cell["task"] == task), "correct",
        "{:.1%}",
    )  # fmt: skip
    for title, measure, form in (
        ("Density: tiles computed, % of dense", "density", "{:.1%}"),
        ("Recall: share of the dense softmax attended, sampled rows", "recall", "{:.3f}"),
        ("Error of attention's output, relative", "error", "{:.3f}"),
        ("Greedy tokens equal to dense's, %", "agreement", "{:.1%}"),
    ):
        lines += _block(title, cells, lengths, heads, at, measure, form)
    lines += ["", *(f"{method:22}{NOTES[method]}" for method in methods_of(cells))]
    left = record["left_out"]
    if left:
        lines += [
            "",
            f"Left out, as the time was over ({len(left)} cells): {', '.join(left[:8])}{' …' * (len(left) > 8)}",
        ]
    return "\n".join(lines)


def heat_maps(record: dict[str, Any], folder: Path) -> list[Path]:
    """One picture a group of tasks: methods down, lengths and in them depths across, exact match as colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    for group, tasks in GROUPS.items():
        cells = [cell for cell in record["cells"] if cell["task"] in tasks]
        columns = sorted({(cell["length"], cell["depth"]) for cell in cells})
        methods = methods_of(cells)
        if not cells:
            continue
        values = [
            [
                mean([c for c in cells if c["method"] == method and (c["length"], c["depth"]) == column], "correct")
                for column in columns
            ]
            for method in methods
        ]
        figure, axes = plt.subplots(
            figsize=(2.6 + 0.46 * len(columns), 1.5 + 0.34 * len(methods)), layout="constrained"
        )
        shown = [[float("nan") if v is None else v for v in row] for row in values]
        image = axes.imshow(shown, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                ink = "black" if value is None or value > 0.6 else "white"
                said = "-" if value is None else f"{100 * value:.0f}"
                axes.text(x, y, said, ha="center", va="center", fontsize=7, color=ink)
        axes.set_yticks(range(len(methods)), methods, fontsize=8)
        axes.set_xticks(range(len(columns)), [f"{depth:.0%}" for _, depth in columns], fontsize=7, rotation=90)
        lengths = [length for length, _ in columns]
        for length in sorted(set(lengths)):
            first, count = lengths.index(length), lengths.count(length)
            if first:
                axes.axvline(first - 0.5, color="white", linewidth=3)
            axes.text(
                first + (count - 1) / 2, -0.75, f"{length / K:.4g}K", ha="center", va="bottom", fontsize=9
            )  # fmt: skip
        axes.set_xlabel("depth, under the prompt's length in tokens", fontsize=8)
        axes.set_title(
            f"{group}: exact match in % at {record['what']['density']:.0%} of dense attention's tiles", fontsize=10,
            pad=22,
        )  # fmt: skip
        figure.colorbar(image, shrink=0.8)
        made.append(folder / f"accuracy-{group.replace(' ', '-')}.png")
        figure.savefig(made[-1], dpi=130)
        plt.close(figure)
    return made
