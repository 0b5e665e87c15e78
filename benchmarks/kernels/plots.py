"""Two pictures of the table: where each stage stands under the roof, and how much faster than dense by length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import K
from benchmarks.kernels.marks import OURS, Table
from benchmarks.kernels.measure import Row

PUBLISHED = {32 * K: 3.9, 128 * K: 13.7, 512 * K: 27.0}  # FlashPrefill V2 on an H200, blocks, 28:4, against FA3
COLOURS = {
    "estimate": "tab:blue", "select": "tab:orange", "permute": "tab:green", "plan": "tab:purple", "attend": "tab:red",
    "merge": "tab:brown",
}  # fmt: skip


def roofline(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Rate against intensity of every stage, from the least work that it must do (benchmarks/kernels/work.py)."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5.5))
    top, slope = about["ceilings"]["tflops"], about["ceilings"]["tbps"]
    intensity = [2.0**-4, top / slope, 2.0**15]
    axes.plot(
        intensity, [min(top, slope * x) for x in intensity], color="black", label=f"{top:.0f} TFLOP/s, {slope:.2f} TB/s"
    )
    lengths = sorted({r.tokens for r in rows if r.contestant == OURS and r.stages})
    for stage, colour in COLOURS.items():
        points = [
            (ops / moved, ops / row.stages[stage] / 1e9, 14 + 14 * lengths.index(row.tokens))
            for row in rows if row.contestant == OURS and row.stages.get(stage, 0.0) > 0.0 and stage in row.work
            for ops, moved in [row.work[stage]] if ops > 0
        ]  # fmt: skip
        if points:
            x, y, size = zip(*points, strict=True)
            axes.scatter(x, y, s=size, color=colour, alpha=0.6, label=stage)
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte that must move",
        ylabel="T operations/s (an element moved or compared counts as one)",
        title=f"Stages of sparse prefill on {about['gpu']}; larger dots are longer prompts",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def speedup(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Whole operator, selection included, over the fastest dense kernel of the same run; one panel a shape."""
    plt = _pyplot()
    table = Table(rows)
    shapes = table.shapes()
    figure, panels = plt.subplots(
        1, max(len(shapes), 1), figsize=(6.5 * max(len(shapes), 1), 5), sharey=True, squeeze=False
    )
    for axes, shape in zip(panels[0], shapes, strict=False):
        for case in ("mix", "blocks", "columns", "slashes", "grid", "boundary"):
            found = {r.tokens: s for r in rows if r.shape == shape and (r.case, r.contestant) == (case, OURS)
                     and (s := table.speedup(r)) is not None}  # fmt: skip
            if found:
                lengths = sorted(found)
                axes.plot(
                    lengths, [found[n] for n in lengths], marker="o", label=case,
                    linewidth=2.5 if case == "mix" else 1.2, color="black" if case == "mix" else None,
                )  # fmt: skip
        axes.scatter(
            list(PUBLISHED), list(PUBLISHED.values()), marker="*", s=90, color="red", zorder=3,
            label="FlashPrefill V2, published (blocks)",
        )  # fmt: skip
        ticks = sorted({r.tokens for r in rows if r.shape == shape} | set(PUBLISHED))
        axes.set(
            xscale="log", yscale="log", xlabel="tokens", ylabel="times as fast as the best dense kernel", title=shape
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{n / K:g}K" for n in ticks], rotation=60, fontsize=8)
        axes.set_yticks(marks := [2.0**n for n in range(-4, 10)], [f"{m:g}" for m in marks])
        axes.set_yticks([], minor=True)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper left")
    figure.suptitle(f"{about['gpu']}, bf16, head_dim 128, commit {about['commit']}", fontsize=10)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
