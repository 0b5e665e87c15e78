"""What a server's sparse prefills did, written down: the demo's tables and picture and the parity tests read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mm_sglang.config import Trace
from mm_sglang.kernels.inspection import by_pattern
from mm_sglang.kernels.layout import TokenLayout, VisionItem
from mm_sglang.kernels.plan import Plan


class Tracer:
    """Appends one JSON line per request, chunk and layer; saves tensors of the layers asked for."""

    def __init__(self, trace: Trace, *, rank: int, first_head: int) -> None:
        self.folder = Path(trace.dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.layers = trace.tensors
        self.first_head = first_head
        self.rank = rank
        self.lines = (self.folder / f"rank{rank}.jsonl").open("a", encoding="utf-8", buffering=1)

    def record(self, rid: str, layer: int, layout: TokenLayout, plan: Plan, tensors: tuple[torch.Tensor, ...]) -> None:
        """`tensors`: q, k, v and output of the chunk, as the engine saw them."""
        groups = [
            {
                "pattern": pattern.to_dict(),
                "heads": [self.first_head + h for h in heads],
                "tiles": tiles,
                "partial_tiles": partial,
                "causal_tiles": plan.causal_tiles * len(heads),
            }
            for pattern, heads, tiles, partial in by_pattern(plan)
        ]
        line: dict[str, Any] = {"rid": rid, "layer": layer, "prefix": plan.prefix, "queries": plan.queries}
        line |= {"tokens": layout.counts(), "groups": groups}
        if layer in self.layers:
            name = f"{rid}-layer{layer}-at{plan.prefix}-rank{self.rank}.pt"
            saved = dict(zip(("q", "k", "v", "out"), (t.contiguous() for t in tensors), strict=True))
            torch.save(saved, self.folder / name)
            line |= {"tensors": name, "items": [asdict(item) for item in layout.items]}
        self.lines.write(json.dumps(line) + "\n")


def read_trace(folder: str | Path, rank: int = 0) -> Iterator[dict[str, Any]]:
    """The lines a Tracer wrote, with `items` turned back into VisionItems; a last line cut short is left out."""
    path = Path(folder) / f"rank{rank}.jsonl"
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if not text.endswith("\n"):
            return
        line = json.loads(text)
        for item in line.get("items", []):
            item["spans"] = tuple((start, end) for start, end in item["spans"])
        line["items"] = tuple(VisionItem(**item) for item in line.get("items", []))
        yield line
