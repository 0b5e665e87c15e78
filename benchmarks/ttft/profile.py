"""Where the GPU's time goes in a prefill: SGLang's own profile of it, its kernels sorted into stages."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

# First match wins. The names of our kernels are those in kernels/; the rest are SGLang's, FlashInfer's and cuBLAS'.
STAGES: dict[str, str] = {
    "estimate": r"^_(logits|row_stats|combine|mass|pool)\b",
    "select": r"^_(keys|narrow|search|keep|buckets|hulls|scores|choose)\b",
    "permute (copies of q, k, v)": r"^_(segment|count|place|gather_keys|move_queries)\b",
    "plan": r"^_(limits|append)\b",
    "attention": r"flash|attention|fmha|_forward\b",
    "linear layers": r"gemm|nvjet|cublas|cutlass",
    "norm, rotary, activation": r"norm|rotary|rope|act_and_mul|silu|swiglu",
    "KV cache writes and page table": r"store|set_kv|cache|index|gather|scatter",
    "copies": r"memcpy|memset",
}
OTHER = "elementwise and other"


def stage_of(kernel: str) -> str:
    """The stage a kernel's name belongs to."""
    return next((name for name, found in STAGES.items() if re.search(found, kernel, re.IGNORECASE)), OTHER)


def by_stage(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by stage, of nothing running, and the largest kernels, of a Chrome trace's GPU events."""
    found = sorted(
        (float(e["ts"]), float(e["dur"]), str(e["name"]))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    if not found:
        raise ValueError("the trace holds no kernel")
    stages: dict[str, float] = {}
    kernels: dict[str, float] = {}
    busy, until = 0.0, found[0][0]
    for start, length, name in found:
        stages[stage_of(name)] = stages.get(stage_of(name), 0.0) + length / 1e6
        kernels[name[:120]] = kernels.get(name[:120], 0.0) + length / 1e6
        busy += max(0.0, start + length - max(start, until))
        until = max(until, start + length)
    largest = sorted(kernels.items(), key=lambda kernel: -kernel[1])[:40]
    return {
        "seconds": (until - found[0][0]) / 1e6, "idle": (until - found[0][0] - busy) / 1e6, "launches": len(found),
        "stages": dict(sorted(stages.items(), key=lambda stage: -stage[1])), "largest": dict(largest),
    }  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """`by_stage` of the one trace that SGLang's profiler wrote into the folder."""
    (path,) = folder.rglob("*.trace.json.gz")
    with gzip.open(path, "rt") as stream:
        return by_stage(json.load(stream)["traceEvents"])


def lines(profile: dict[str, Any]) -> list[str]:
    """For the table."""
    parts = {**profile["stages"], "nothing": profile["idle"]}
    return [f"    {name:32} {seconds:8.3f} s {seconds / profile['seconds']:6.1%}" for name, seconds in parts.items()]
