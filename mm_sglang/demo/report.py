"""Numbers read off a trace: density by layer and pattern, and how much of dense attention the tiles kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_sglang.config import SparseConfig
from mm_sglang.kernels.inspection import attended, by_pattern
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import reference_ops
from mm_sglang.kernels.patterns import TextTail
from mm_sglang.kernels.plan import Plan
from mm_sglang.kernels.prefill import make_plan

SAMPLED_ROWS = 32  # of each chunk


@dataclass(frozen=True, kw_only=True)
class Density:
    """Tiles of one pattern in one layer, all its heads and all chunks of one prompt."""

    layer: int
    pattern: str
    heads: int
    tiles: int
    partial_tiles: int
    causal_tiles: int


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Of one pattern's heads on sampled rows: share of dense attention weight kept, and relative output error."""

    pattern: str
    recall: float
    error: float


def prompt_chunks(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trace lines of the request with the most keys (the longest prompt), the last one if several are alike."""
    requests: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        requests.setdefault(line["rid"], []).append(line)
    if not requests:
        raise ValueError("the trace holds no sparse chunk: was the prompt shorter than min_tokens?")
    covered = {rid: sum(line["queries"] for line in chunks) for rid, chunks in requests.items()}
    longest = max(covered.values())
    return next(chunks for rid, chunks in reversed(requests.items()) if covered[rid] == longest)


def density_table(chunks: Sequence[dict[str, Any]]) -> list[Density]:
    rows: dict[tuple[int, str], Density] = {}
    for line in chunks:
        for group in line["groups"]:
            key = (line["layer"], group["pattern"]["pattern"])
            old = rows.get(key)
            rows[key] = Density(
                layer=key[0],
                pattern=key[1],
                heads=len(group["heads"]),
                tiles=group["tiles"] + (old.tiles if old else 0),
                partial_tiles=group["partial_tiles"] + (old.partial_tiles if old else 0),
                causal_tiles=group["causal_tiles"] + (old.causal_tiles if old else 0),
            )
    return [rows[key] for key in sorted(rows)]


def replay(
    folder: Path, lines: Sequence[dict[str, Any]], config: SparseConfig
) -> tuple[TokenLayout, list[Plan], list[dict[str, torch.Tensor]]]:
    """Plans of one layer's chunks, made again from the q and k the server saved; the last chunk's layout.

    RuntimeError if a plan made here has other tiles than the server's: then the picture would not show what ran.
    """
    plans, saved = [], []
    layout = TokenLayout(items=(), length=0)
    for line in lines:
        tensors = torch.load(folder / line["tensors"], weights_only=True)
        layout = TokenLayout(items=line["items"], length=line["prefix"] + line["queries"])
        heads = tensors["q"].shape[1]
        patterns = config.patterns(line["layer"], heads)
        assert patterns is not None
        plan = make_plan(
            tensors["q"],
            tensors["k"],
            layout=layout,
            patterns=patterns,
            scale=tensors["q"].shape[2] ** -0.5,
            ops=reference_ops(),
            tail=config.text_tail,
        )
        if [tiles for _, _, tiles, _ in by_pattern(plan)] != [g["tiles"] for g in line["groups"]]:
            raise RuntimeError(f"chunk at {line['prefix']}: the plan made again differs from the one the server ran")
        plans.append(plan)
        saved.append(tensors)
    return layout, plans, saved


def recalls(plans: Sequence[Plan], tensors: Sequence[dict[str, torch.Tensor]]) -> list[Recall]:
    """One Recall a pattern, over evenly spaced rows of every chunk."""
    kept: dict[str, list[torch.Tensor]] = {}
    wrong: dict[str, list[torch.Tensor]] = {}
    for plan, t in zip(plans, tensors, strict=True):
        rows = torch.linspace(0, plan.queries - 1, min(SAMPLED_ROWS, plan.queries)).long()
        share, scale = t["q"].shape[1] // t["k"].shape[1], t["q"].shape[2] ** -0.5
        future = torch.arange(plan.keys) > (plan.prefix + rows)[:, None]
        for pattern, heads, _, _ in by_pattern(plan):
            for head in () if isinstance(pattern, TextTail) else heads:
                logits = t["q"][rows, head].double() @ t["k"][:, head // share].double().T * scale
                weights = logits.masked_fill(future, float("-inf")).softmax(-1)
                kept.setdefault(pattern.kind, []).append((weights * attended(plan, head)[rows]).sum(-1))
                dense = weights @ t["v"][:, head // share].double()
                error = (t["out"][rows, head].double() - dense).norm(dim=-1) / dense.norm(dim=-1)
                wrong.setdefault(pattern.kind, []).append(error)
    return [
        Recall(pattern=kind, recall=float(torch.cat(kept[kind]).mean()), error=float(torch.cat(wrong[kind]).mean()))
        for kind in kept
    ]
