"""grid: evenly spaced lines through a video (MMInference section 3.2, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels.estimate.reference import column_mass
from mm_sglang.kernels.layout import TEXT, TokenLayout
from mm_sglang.kernels.patterns.base import Chunk, HeadPattern, Selection, keep_nothing, require_at_least
from mm_sglang.kernels.select.reference import top_budget

STRIDES = ("frame", "row")


@dataclass(frozen=True, kw_only=True)
class Grid(HeadPattern):
    """The same few places of every frame (stride "frame") or of every row (stride "row").

    A line is one residue of the token's index inside its item modulo the stride, so lines stay true where timestamp
    text between frames breaks a constant distance (Qwen3-VL) and in each of several videos. The phases, `lines` of
    them an item, are found online from the last queries. Vertical lines are key columns; horizontal lines are the
    query rows of the same residues, computed in full. Text keys are kept for all, text queries are computed in full,
    and an image is a video of one frame. Heads that share a KV head share their phases.

    Args:
        stride: "frame" or "row".
        lines: residues kept an item. Default: 4.
        vertical, horizontal: which lines; at least one.
        sink: first positions that are always kept. Default: 128.
        local: nearest distances that are always kept, at least 1. Default: 1024.
        last_q: queries of the estimate. Default: 64.
    """

    kind: ClassVar[str] = "grid"
    stride: str = "frame"
    lines: int = 4
    vertical: bool = True
    horizontal: bool = True
    sink: int = 128
    local: int = 1024
    last_q: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride not in STRIDES:
            raise ValueError(f"grid: stride={self.stride!r}: needs one of {STRIDES}")
        if not (self.vertical is True or self.horizontal is True):
            raise ValueError(
                f"grid: vertical={self.vertical!r}, horizontal={self.horizontal!r}: needs one of them true"
            )
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "lines", "local", "last_q")

    @property
    def probe(self) -> int:
        return self.last_q

    def select(self, chunk: Chunk, probe: torch.Tensor | None) -> Selection:
        assert probe is not None
        kept = keep_nothing(chunk)
        line, first = line_of(chunk.layout, self.stride)
        text = chunk.layout.modality == TEXT
        on_line = torch.zeros(chunk.rows, chunk.keys, dtype=torch.bool, device=probe.device)  # [R, Nk]
        if len(first) > 1:
            mass = torch.zeros(chunk.rows, first[-1], device=probe.device)  # [R, lines of all items]
            mass.index_add_(1, line[~text], column_mass(probe, chunk.row)[:, ~text])
            nothing = torch.zeros(first[-1], dtype=torch.bool, device=probe.device)
            chosen = torch.cat(
                [top_budget(mass[:, a:b], self.lines, nothing[a:b]) for a, b in zip(first, first[1:], strict=False)], 1
            )
            on_line[:, ~text] = chosen[:, line[~text]]
        kept.columns[:, : self.sink] = True
        kept.columns.logical_or_(text | on_line if self.vertical else text)
        kept.rows.logical_or_((text | on_line)[:, chunk.prefix :] if self.horizontal else text[chunk.prefix :])
        kept.diagonals[:, : self.local] = True
        return kept


def line_of(layout: TokenLayout, stride: str) -> tuple[torch.Tensor, list[int]]:
    """Line number of each position (int64 [N], -1 for text), numbered through all items, and each item's first line."""
    sizes = [item.frame_tokens if stride == "frame" else item.cols for item in layout.items]
    first = [0]
    for size in sizes:
        first.append(first[-1] + size)
    line = torch.full_like(layout.item, -1, dtype=torch.int64)
    vision = layout.item >= 0
    if sizes:
        item = layout.item[vision].long()
        cols = torch.tensor([i.cols for i in layout.items], device=layout.item.device)[item]
        inside = layout.x[vision] + (layout.y[vision] * cols if stride == "frame" else 0)
        line[vision] = torch.tensor(first, device=layout.item.device)[item] + inside
    return line, first
