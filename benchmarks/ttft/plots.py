"""A picture of a record: time to first token by length, the GPU's time by stage, and chunk sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import K

COLOURS = {"stock": "tab:gray", "mm_sparse": "tab:blue"}


def plot(record: dict[str, Any], path: Path) -> None:
    """Write a PNG of what the record holds of the parts "whole", "ttft" and "chunks"; none if it has none."""
    if not any(run["part"] in ("whole", "ttft", "chunks") for run in record["runs"]):
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), width_ratios=(5, 4, 4))
    for part, style in (("whole", "-"), ("ttft", ":")):
        for run in (r for r in record["runs"] if r["part"] == part):
            at = [t["tokens"] / K for t in run["ttft"]]
            left.loglog(
                at, [t["seconds"] for t in run["ttft"]], style, marker="o", color=COLOURS.get(run["name"]),
                label=f"{run['name']}, {run['layers']} layers",
            )  # fmt: skip
    left.set(title="Time to first token", xlabel="thousand tokens (1024)", ylabel="seconds")
    left.grid(alpha=0.3)
    for run in (r for r in record["runs"] if "profile" in r):
        profile = run["profile"]
        stages = {**profile["stages"], "nothing": profile["idle"]}
        middle.barh(list(stages)[::-1], list(stages.values())[::-1], color=COLOURS["mm_sparse"])
        for row, seconds in enumerate(list(stages.values())[::-1]):
            middle.text(seconds, row, f" {seconds:.2f}", va="center", fontsize=8)
        middle.set(
            title=f"{profile['tokens'] // K}K tokens, {run['layers']} layers: GPU by stage", xlabel="seconds",
            xlim=(0, 1.15 * max(stages.values())),
        )  # fmt: skip
    chunks = [r for r in record["runs"] if r["part"] == "chunks"]
    for tokens in (128 * K, 512 * K, 1024 * K):
        found = {r["chunk"]: t["seconds"] for r in chunks if r["name"] != "stock" for t in r["ttft"]
                 if t["tokens"] == tokens}  # fmt: skip
        if found:
            best = min(found.values())
            right.plot(
                [c // K for c in sorted(found)],
                [found[c] / best for c in sorted(found)],
                marker="o",
                label=f"{tokens // K}K",
            )
    right.set(title="mm_sparse by chunk size", xlabel="thousand tokens a chunk", ylabel="TTFT over the best chunk's")
    right.set_xscale("log", base=2)
    right.grid(alpha=0.3)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
