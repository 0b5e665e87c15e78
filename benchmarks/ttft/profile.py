"""Where the GPU's time goes in a prefill: SGLang's own profile of it, its kernels sorted into stages."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

# First match wins. The names of our kernels are those in kernels/; the rest are SGLang's, FlashInfer's and cuBLAS'.
GATHER = "exchange between GPUs"
STAGES: dict[str, str] = {
    GATHER: r"nccl|all_?(gather|reduce)|cross_device|custom_ar",
    "estimate": r"^_(logits|row_stats|combine|mass|pool|clusters)\b",
    "select": r"^_(keys|narrow|search|keep|buckets|hulls|scores|choose)\b",
    "permute (copies of q, k, v)": r"^_(segment|count|place|gather_keys|move_queries)\b",
    "plan": r"^_(limits|append)\b",
    "norm, rotary, activation": r"norm|rotary|rope|act_and_mul|silu|swiglu",  # flashinfernorm: before attention
    "attention": r"flash|attention|fmha|_forward\b",
    "linear layers": r"gemm|nvjet|cublas|cutlass",
    "KV cache writes and page table": r"store|set_kv|cache|index|gather|scatter",
    "copies": r"memcpy|memset",
}
OTHER = "elementwise and other"
WAITS = 12  # of a profile are kept
ATTENDING = ("estimate", "select", "permute (copies of q, k, v)", "plan", "attention")


def stage_of(kernel: str) -> str:
    """The stage a kernel's name belongs to."""
    return next((name for name, found in STAGES.items() if re.search(found, kernel, re.IGNORECASE)), OTHER)


def by_stage(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a Chrome trace's GPU events: seconds by stage, of nothing running, of nothing but an exchange, kernels.

    waits: the longest times of nothing, each as (start in s, seconds, kernel before, kernel after).
    """
    found = _kernels(events)
    if not found:
        raise ValueError("the trace holds no kernel")
    stages: dict[str, float] = {}
    kernels: dict[str, float] = {}
    for _, length, name, _ in found:
        stages[stage_of(name)] = stages.get(stage_of(name), 0.0) + length / 1e6
        kernels[name[:120]] = kernels.get(name[:120], 0.0) + length / 1e6
    waits, seconds, busy = _waits(found), _span(found), _covered(found)
    alone = busy - _covered([kernel for kernel in found if stage_of(kernel[2]) != GATHER])
    largest = sorted(kernels.items(), key=lambda kernel: -kernel[1])[:40]
    return {
        "seconds": seconds, "idle": seconds - busy, "exposed_exchange": alone, "waits": waits[:WAITS],
        "launches": len(found), "stages": dict(sorted(stages.items(), key=lambda stage: -stage[1])),
        "largest": dict(largest),
    }  # fmt: skip


def _kernels(events: list[dict[str, Any]]) -> list[tuple[float, float, str, str]]:
    """(start, length, name, stream) in microseconds, in order."""
    return sorted(
        (float(e["ts"]), float(e["dur"]), str(e["name"]), str(e.get("tid", "")))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )


def _span(kernels: list[tuple[float, float, str, str]]) -> float:
    """Seconds from the first one's start to the last one's end."""
    ends = (start + length for start, length, _, _ in kernels)
    return (max(ends) - kernels[0][0]) / 1e6 if kernels else 0.0


def _covered(kernels: list[tuple[float, float, str, str]]) -> float:
    """Seconds in which at least one of them runs."""
    return _span(kernels) - sum(wait[1] for wait in _waits(kernels))


def _waits(kernels: list[tuple[float, float, str, str]]) -> list[tuple[float, float, str, str]]:
    """Times in which none of them runs, longest first."""
    begin, _, before, _ = kernels[0] if kernels else (0.0, 0.0, "", "")
    until, out = begin, []
    for start, length, name, _ in kernels:
        if start > until:
            out.append(((until - begin) / 1e6, (start - until) / 1e6, before[:60], name[:60]))
        if start + length >= until:
            until, before = start + length, name
    return sorted(out, key=lambda wait: -wait[1])


def timeline(events: list[dict[str, Any]], seconds: float) -> list[tuple[str, float, float, str]]:
    """(stream, start in ms, length in ms, stage) of the kernels of some time in the middle of a trace."""
    found = _kernels(events)
    begin = found[len(found) // 2][0]
    return [
        (stream, (start - begin) / 1e3, length / 1e3, stage_of(name))
        for start, length, name, stream in found if begin <= start < begin + seconds * 1e6
    ]  # fmt: skip


def read(folder: Path, steps: int) -> dict[str, Any]:
    """`by_stage` of the folder's first trace, all ranks' stages, and a `steps`-th of the first as a timeline."""
    ranks = []
    for path in sorted(folder.rglob("*.trace.json.gz")):
        with gzip.open(path, "rt") as stream:
            events = json.load(stream)["traceEvents"]
        ranks.append(by_stage(events))
        if len(ranks) == 1:
            shown = timeline(events, ranks[0]["seconds"] / steps)
    return ranks[0] | {"ranks": [{k: r[k] for k in ("seconds", "idle", "stages")} for r in ranks], "timeline": shown}


def lines(profile: dict[str, Any]) -> list[str]:
    """For the table: every stage, and all that attention needs together."""
    attending = sum(profile["stages"].get(stage, 0.0) for stage in ATTENDING)
    parts = {**profile["stages"], "nothing": profile["idle"], "attention and all it needs": attending}
    return [f"    {name:32} {seconds:8.3f} s {seconds / profile['seconds']:6.1%}" for name, seconds in parts.items()]
