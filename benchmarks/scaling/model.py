"""The cost model (parallel/cost.py) fed with a measured profile: predictions beside measurements, and for more GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.kernels.cases import K
from benchmarks.ttft.model import TEXT
from mm_sglang.parallel.cost import Figures, Links, Prediction, chunk_bounds, predict

M = 1024 * K
BY_TILES = ("_choose", "_scores", "_hulls", "_append")  # kernels of "select" and "plan" that go by a rank's own tiles
REPEATED = ("select", "permute (copies of q, k, v)", "plan")
PREDICTED = ((4, 1), (8, 1), (16, 2), (64, 8))  # GPUs, hosts
MILLIONS = (1, 2, 4, 10)
COMPILES = 0.1  # seconds: a GPU that waits longer in a profile waits for a kernel to be compiled, once
MEMORY = 141e9  # bytes of an H200


def figures(record: dict[str, Any], *, vision: float = 0.0, decode: float = 0.0) -> Figures:
    """From the longest profile of mm_sparse on one GPU in a record of benchmarks.scaling or benchmarks.ttft.

    vision, decode: seconds a token; neither benchmark has them.

    Raises:
        ValueError: no such profile.
    """
    found = [r for r in record["runs"] if r["name"] == "mm_sparse" and "profile" in r and r.get("gpus", 1) == 1]
    if not found:
        raise ValueError("the record has no profile of mm_sparse on one GPU: needs `--gpus 1` first")
    run = max(found, key=lambda r: (r["layers"], r["profile"]["tokens"]))
    profile, layers = run["profile"], run["layers"]
    stages, tokens = profile["stages"], profile["tokens"]
    bounds = list(chunk_bounds(tokens, run["chunk"]))
    keys, pairs = sum(k for _, k in bounds), sum(q * k for q, k in bounds)
    tiles = sum(profile["largest"].get(name, 0.0) for name in BY_TILES)
    repeated = sum(stages.get(name, 0.0) for name in REPEATED) - tiles
    compiling = sum(seconds for _, seconds, *_ in profile.get("waits", []) if seconds > COMPILES)
    named = compiling + stages.get("attention", 0.0) + stages.get("estimate", 0.0) + repeated + tiles
    return Figures(
        layers=layers, kv_bytes=2 * 2 * layers * TEXT["num_key_value_heads"] * TEXT["head_dim"],
        row_bytes=2 * 2 * TEXT["hidden_size"],  # hidden states and residual
        linear=(profile["seconds"] - named) / tokens, attention=stages.get("attention", 0.0) / tokens,
        tiles=tiles / pairs, estimate=stages.get("estimate", 0.0) / keys, repeated=repeated / keys,
        vision=vision, decode=decode,
    )  # fmt: skip


def beside(record: dict[str, Any], given: Figures, links: Links) -> Iterator[tuple[dict[str, Any], int, float, float]]:
    """(run, tokens, measured, predicted) of every time to first token that mm_sparse has there with as many layers."""
    for run in record["runs"]:
        if run["name"] != "mm_sparse" or run["layers"] != given.layers:
            continue
        for t in run["ttft"]:
            found = predict(given, links, tokens=t["tokens"], gpus=run.get("gpus", 1), chunk=run["chunk"])
            yield run, t["tokens"], t["seconds"], found.ttft


def prediction_table(record: dict[str, Any], *, vision: float = 0.0, decode: float = 0.0, workers: int = 1) -> str:
    """What the model says of the record's own runs, then of 4 to 64 GPUs."""
    links, given = Links(), figures(record, vision=vision, decode=decode)
    about = record["about"]
    lines = [f"{about['gpu']}, commit {about['commit']}, {given.layers} layers; parallel/cost.py says what is assumed."]
    lines.append(
        f"Links: {links.gather / 1e9:.0f} GB/s into a GPU inside a host and {links.latency * 1e6:.0f} us an exchange "
        f"(measured on four H200), {links.exchanges} exchanges a layer and chunk, {links.host / 1e9:.0f} GB/s between "
        "hosts (not measured)."
    )
    lines += ["", f"{'GPUs':>4} {'chunk':>5} {'tokens':>7} {'measured s':>10} {'model s':>8} {'model over':>10}"]
    plain = figures(record)
    for run, tokens, measured, modelled in beside(record, plain, links):
        lines.append(
            f"{run.get('gpus', 1):4} {run['chunk'] // K:4}K {tokens // K:6}K {measured:10.3f} {modelled:8.3f} "
            f"{modelled / measured:10.2f}"
        )
    lines += ["", f"{'GPUs':>4} {'hosts':>5} {'between':>8} {'tokens':>6} {'TTFT s':>8} {'KV GB':>6}  parts, s"]
    for gpus, hosts in PREDICTED:
        for millions in MILLIONS:
            for pipeline in (True, False) if hosts > 1 else (True,):
                chunk = 32 * K * (gpus // hosts if pipeline else gpus)
                found = predict(
                    given, links, tokens=millions * M, gpus=gpus, hosts=hosts, pipeline=pipeline, chunk=chunk,
                    workers=workers,
                )  # fmt: skip
                lines.append(_line(gpus, hosts, pipeline, millions, found))
    lines.append("Chunks of 32K a rank. '!': keys and values alone do not fit a GPU of 141 GB. Computed, not measured.")
    return "\n".join(lines)


def _line(gpus: int, hosts: int, pipeline: bool, millions: int, found: Prediction) -> str:
    between = "-" if hosts == 1 else "stages" if pipeline else "gather"
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found.parts.items() if seconds >= 0.005)
    full = "!" if found.kv_bytes > MEMORY else " "
    return f"{gpus:4} {hosts:5} {between:>8} {millions:5}M {found.ttft:8.2f} {found.kv_bytes / 1e9:6.1f}{full} {parts}"
