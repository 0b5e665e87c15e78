"""The table and the picture of a scaling record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import K
from benchmarks.ttft.profile import GATHER


def table(record: dict[str, Any]) -> str:
    """Seconds by length, how far N GPUs are from N times one, and where the time of the longest goes.

    Compared with one GPU, and with stock on as many, at the chunk that was best there.
    """
    lines = [f"{record['about']['gpu']}, commit {record['about']['commit']}, {record['layers']} layers"]
    lines.append(
        f"{'GPUs':>4}  {'who':12} {'chunk':>5} {'tokens':>8} {'TTFT s':>9} {'efficiency':>10} {'over stock':>10} "
        f"{'peak GB':>8}"
    )
    seconds: dict[tuple[int, str, int], float] = {}
    for run in record["runs"]:
        for t in run["ttft"]:
            key = run["gpus"], run["name"], t["tokens"]
            seconds[key] = min(t["seconds"], seconds.get(key, t["seconds"]))
    for run in sorted(record["runs"], key=lambda r: (r["name"], r["gpus"], r["chunk"])):
        for t in run["ttft"]:
            one = seconds.get((1, run["name"], t["tokens"]))
            stock = seconds.get((run["gpus"], "stock", t["tokens"]))
            share = f"{one / t['seconds'] / run['gpus']:10.2f}" if one else f"{'-':>10}"
            ratio = f"{stock / t['seconds']:9.2f}x" if stock and run["name"] != "stock" else f"{'-':>10}"
            lines.append(
                f"{run['gpus']:4}  {run['name']:12} {run['chunk'] // K:4}K {t['tokens'] // K:7}K {t['seconds']:9.3f} "
                f"{share} {ratio} {t['peak_gb']:8.1f}"
            )
        for why in ("left_out", "error"):
            if run.get(why):
                lines.append(f"      {run['name']}: {why}: {run[why]}")
    for run in record["runs"]:
        if "profile" in run:
            what = f"{run['gpus']} GPUs, chunk {run['chunk'] // K}K"
            lines += ["", f"{what}, {run['profile']['tokens'] // K}K: seconds of the slowest rank, balance"]
            lines += [f"    {name:32} {most:8.3f} {balance:6.3f}" for name, most, balance in balances(run["profile"])]
            lines.append(f"    {'exchange that nothing hides':32} {run['profile']['exposed_exchange']:8.3f}")
            wasted, part = lost(run["profile"])
            lines.append(f"    {'lost to gather and imbalance':32} {wasted:8.3f} {part:6.1%} of the prefill")
    return "\n".join(lines)


def balances(profile: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(stage, seconds of the slowest rank, slowest over mean), largest first."""
    out = []
    for stage in profile["stages"]:
        own = [rank["stages"].get(stage, 0.0) for rank in profile["ranks"]]
        out.append((stage, max(own), max(own) / (sum(own) / len(own)) if sum(own) else 1.0))
    return out


def lost(profile: dict[str, Any]) -> tuple[float, float]:
    """Seconds lost to gather and imbalance, and their share of the prefill: an exchange that nothing hides, and what
    the rank with the most to compute has more than the mean. Never too little: where rank 0 waits for that rank inside
    an exchange, the wait counts twice."""
    compute = [sum(t for stage, t in rank["stages"].items() if stage != GATHER) for rank in profile["ranks"]]
    seconds = profile["exposed_exchange"] + max(compute) - sum(compute) / len(compute)
    return seconds, seconds / profile["seconds"]


def plot(record: dict[str, Any], path: Path) -> None:
    """A layer of a chunk in the middle of the longest prefill, for the most GPUs: what runs when, by stream."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    profiled = [run for run in record["runs"] if run.get("profile", {}).get("timeline")]
    if not profiled:
        return
    run = max(profiled, key=lambda r: (r["gpus"], r["profile"]["tokens"]))
    rows = run["profile"]["timeline"]
    streams, stages = sorted({row[0] for row in rows}), sorted({row[3] for row in rows})
    gathers = {row[0] for row in rows if row[3] == GATHER}
    kinds = [f"{'gather' if stream in gathers else 'compute'} (stream {stream})" for stream in streams]
    figure, axis = pyplot.subplots(figsize=(13, 1.2 + 0.7 * len(streams)))
    colours = pyplot.get_cmap("tab20")
    for number, stage in enumerate(stages):
        for stream in streams:
            bars = [(start, length) for on, start, length, what in rows if (on, what) == (stream, stage)]
            axis.broken_barh(bars, (streams.index(stream) - 0.4, 0.8), color=colours(number), label=stage)
    labels = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    axis.legend(labels.values(), labels.keys(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    axis.set(
        yticks=range(len(streams)), yticklabels=kinds, xlabel="milliseconds",
        title=f"N = {run['gpus']}, rank 0: about one layer of a chunk of {run['chunk'] // K}K, "
        f"{run['profile']['tokens'] // K}K tokens, {record['about']['gpu']}",
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
