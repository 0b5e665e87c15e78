"""The table and the heat maps of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.methods import METHODS, NOTES

K = 1024
Cells = Sequence[dict[str, Any]]


def mean(cells: Cells, measure: str) -> float | None:
    """Over cells, each as much as another; None without any."""
    return sum(cell[measure] for cell in cells) / len(cells) if cells else None


def shared(cells: Cells) -> Cells:
    """Cells of a task, length and depth that every method has: only there are methods' means comparable."""
    methods: dict[tuple[Any, ...], set[str]] = {}
    for cell in cells:
        methods.setdefault(_where(cell), set()).add(cell["method"])
    every = set(methods_of(cells))
    return [cell for cell in cells if methods[_where(cell)] == every]


def _where(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["task"], cell["length"], cell["depth"]


def _of(measure: str, form: str) -> Callable[[Cells], str]:
    def show(cells: Cells) -> str:
        value = mean(cells, measure)
        return "-" if value is None else form.format(value)

    return show


def _at_density(cells: Cells) -> str:
    return f"{mean(cells, 'correct'):.1%} /{100 * (mean(cells, 'density') or 0):4.1f}" if cells else "-"


def _spread(cells: Cells) -> str:
    every = [100 * cell["density"] for cell in cells]
    return f"{min(every):.1f}-{max(every):.1f}" if every else "-"


def _block(title: str, cells: Cells, by: str, heads: Mapping[Any, str], show: Callable[[Cells], str]) -> list[str]:
    """A line a method: a column a value of `by`, and all values together where every method has the cell."""
    lines = ["", title, f"{'':22}" + "".join(f"{head:>14}" for head in [*heads.values(), "mean"])]
    for method in methods_of(cells):
        own, fair = ([c for c in some if c["method"] == method] for some in (cells, shared(cells)))
        shown = [*(show([c for c in own if c[by] == value]) for value in heads), show(fair)]
        lines.append(f"{method:22}" + "".join(f"{text:>14}" for text in shown))
    return lines


def methods_of(cells: Cells) -> list[str]:
    """Methods with a cell, in METHODS' order."""
    present = {cell["method"] for cell in cells}
    return [method for method in METHODS if method in present]


def table(record: dict[str, Any]) -> str:
    """Accuracy beside the density that it cost, every other measure by length, each task, and what the methods are."""
    cells, what = record["cells"], record["what"]
    lengths = {n: f"{n / K:.4g}K" for n in sorted({cell["length"] for cell in cells})}
    tasks = {task: task for task in dict.fromkeys(cell["task"] for cell in cells)}
    samples = sum(cell["samples"] for cell in cells if cell["method"] == "dense")
    lines = [
        f"{what['model']} ({what['model_hash']}), {samples} test prompts, on {record['about']['gpu']}",
        f"Budgets of every layer: bisected to at most {what['density']:.0%} of dense attention's tiles of 128 x 128, "
        "on average over",
        "training prompts of the same task and length; auto sets its own. Other prompts cost more or less, and short "
        "ones never",
        "come under what a method keeps anyway: so the density measured stands beside the accuracy.",
        f"Searched patterns: {record['about']['searched']}.",
    ]
    fair = shared(cells)
    if len(fair) < len(cells):
        lines.append("Not every method has every cell: means, and the accuracy by task, are over those that all have.")
    lines += _block("Exact match, % / tiles computed, % of dense, by length", cells, "length", lengths, _at_density)
    lines += _block("Exact match, % / tiles computed, % of dense, by task", fair, "task", tasks, _at_density)
    for title, show in (
        ("Tiles computed, % of dense: least and most of a cell", _spread),
        ("Recall: share of the dense softmax attended, sampled rows", _of("recall", "{:.3f}")),
        ("Error of attention's output, relative", _of("error", "{:.3f}")),
        ("Greedy tokens equal to dense's, %", _of("agreement", "{:.1%}")),
    ):
        lines += _block(title, cells, "length", lengths, show)
    for task in tasks:
        own = [cell for cell in cells if cell["task"] == task]
        lines += _block(f"{task}: exact match, % / tiles computed, % of dense", own, "length", lengths, _at_density)
    lines += ["", *(f"{method:22}{NOTES[method]}" for method in methods_of(cells))]
    left = record["left_out"]
    if left:
        lines += [
            "",
            f"Left out, as the time was over ({len(left)} cells): {', '.join(left[:8])}{' …' * (len(left) > 8)}",
        ]
    return "\n".join(lines)


def heat_maps(record: dict[str, Any], folder: Path) -> list[Path]:
    """One picture a task: methods down, lengths and in them depths across, exact match as colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    for task in dict.fromkeys(cell["task"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["task"] == task]
        columns = sorted({(cell["length"], cell["depth"]) for cell in cells})
        methods = methods_of(cells)
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
            f"{task}: exact match in % at {record['what']['density']:.0%} of dense attention's tiles", fontsize=10,
            pad=22,
        )  # fmt: skip
        figure.colorbar(image, shrink=0.8)
        made.append(folder / f"accuracy-{task}.png")
        figure.savefig(made[-1], dpi=130)
        plt.close(figure)
    return made
