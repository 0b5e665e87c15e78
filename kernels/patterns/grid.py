"""grid: evenly spaced lines through a video (MMInference section 3.2, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels import classes
from mm_sglang.kernels.classes import Lines, Stride
from mm_sglang.kernels.estimate.reference import FIXED_POINT
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.a_shape import nearest
from mm_sglang.kernels.patterns.base import HeadPattern, Looked, Selection, View, require_at_least, require_flag

STRIDES = {
    "frame": (Stride(unit="frame"),),
    "row": (Stride(unit="row"),),
    "auto": (
        Stride(unit="frame"), Stride(unit="frame", multiple=2), Stride(unit="row"), Stride(unit="row", multiple=2),
    ),
}  # fmt: skip
SAMPLED_KEYS = 8192  # whole frames, evenly spread: lines are sums over hundreds of keys, so a sample ranks them well
MOST_QUERIES = 1024  # of the estimate, should a frame be longer than that


@dataclass(frozen=True, kw_only=True)
class Grid(HeadPattern):
    """The same few places of every frame (stride "frame"), of every row ("row"), or whichever fits better ("auto").

    A line is one residue of the token's index inside its item modulo the stride. Stride and phases are found online,
    from at least one frame of queries: a stride's score is the share of attention its best lines hold less the share
    of keys they are, so neither long nor short strides are favoured (the paper's maximum over strides is not
    normalised). Vertical lines are key columns; horizontal lines are the query rows of the same residues, computed in
    full (the paper's symmetry: a row phase can't be seen from the last queries alone). An image is a video of one
    frame. Heads that share a KV head share stride and phases.

    Args:
        stride: "frame", "row" or "auto". Default: "frame".
        lines: keys kept a frame, in whole lines, at least one line an item. Default: 4.
        vertical, horizontal: which lines; at least one.
        text: text keys are kept for all, and text queries computed in full. Default: true.
        sink: first positions that are always kept. Default: 128.
        local: nearest distances that are always kept, at least 1. Default: 1024.
        last_q: queries of the estimate, at least; never less than one frame of the longest item. Default: 64.
    """

    kind: ClassVar[str] = "grid"
    budgets: ClassVar[tuple[str, ...]] = ("lines", "local")
    stride: str = "frame"
    lines: int = 4
    vertical: bool = True
    horizontal: bool = True
    text: bool = True
    sink: int = 128
    local: int = 1024
    last_q: int = 64

    def __post_init__(self) -> None:
        if self.stride not in STRIDES:
            raise ValueError(f"grid: stride={self.stride!r}: needs one of {tuple(STRIDES)}")
        require_flag(self, "vertical", "horizontal", "text")
        if not (self.vertical or self.horizontal):
            raise ValueError("grid: vertical=False, horizontal=False: needs one of them true")
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "lines", "local", "last_q")

    def looks_at(self, layout: TokenLayout, queries: int) -> Looked:
        whole = [name for name, rows in (("vision", self.horizontal), ("text", self.text)) if rows]
        return ((None, self._sampled(layout)), *((name, None) for name in whole))  # whole rows are gathered queries

    def _sampled(self, layout: TokenLayout) -> int:
        frame = max((item.frame_tokens for item in classes.begun(layout)), default=0)
        return min(max(self.last_q, frame), MOST_QUERIES)

    def select(self, view: View) -> Selection:
        layout, keys = view.layout, view.keys
        columns, rows, most, rows_most = None, None, 0, 0
        if classes.count(layout, "vision", 0, keys) and view.key_class != "text":
            lines = classes.lines(layout, STRIDES[self.stride], self.lines, SAMPLED_KEYS)
            mass, _ = view.mass(self._sampled(layout), lines.k_pos)
            on_line = best_lines(mass, lines)
            most = lines.bound
            if self.vertical:
                columns = on_line
            if self.horizontal:
                rows, rows_most = on_line[:, view.prefix :], min(most, view.queries)
        text = classes.mask(layout, "text")
        if self.text and view.key_class != "vision" and (number := classes.count(layout, "text", 0, keys)):
            columns = text.expand(len(view.kv_head), -1) if columns is None else columns | text
            most += number
        whole = view.key_class is None and view.query_class != "vision"
        if self.text and whole and (number := classes.count(layout, "text", view.prefix, keys)):
            own = text[view.prefix :]
            rows = own.expand(len(view.kv_head), -1) if rows is None else rows | own
            rows_most = min(rows_most + number, view.queries)
        return Selection(
            sink=self.sink, columns=columns, columns_most=most, bands=nearest(view, self.local),
            rows=rows, rows_most=rows_most,
        )  # fmt: skip


def best_lines(mass: torch.Tensor, lines: Lines) -> torch.Tensor:
    """Bool [R, Nk]: keys on the best lines of the best candidate stride; the same whenever and wherever it is asked.

    Args:
        mass: fp32 [R, F] weight on each of lines.k_pos.
    """
    rows, candidates = len(mass), len(lines.of)
    counted = (mass * FIXED_POINT).long()  # ranks must agree, and atomic adds of floats round in any order
    total = torch.zeros(rows, lines.number + 1, dtype=torch.int64, device=mass.device)
    total.index_add_(1, lines.sampled, counted if candidates == 1 else counted.repeat(1, candidates))
    by_line = total.float() / FIXED_POINT
    by_line[:, lines.number] = -1.0  # fillers rank last
    ranked = by_line[:, lines.table].sort(dim=2, descending=True)  # a few hundred lines an item, not the keys
    chosen, of = lines.taken.expand(rows, -1, -1), lines.of[0]
    if candidates > 1:
        held = torch.where(chosen, ranked.values, 0.0).view(rows, candidates, -1).sum(2)
        best = (held / mass.sum(1, keepdim=True).clamp(min=1e-30) - lines.share).argmax(1)  # [R] candidate
        chosen, of = chosen & (lines.candidate == best[:, None])[..., None], lines.of[best]
    flags = torch.zeros(rows, lines.number + 1, dtype=torch.bool, device=mass.device)
    # a line is in one row of the table only, so nothing is scattered twice but the filler
    flags.scatter_(1, lines.table.expand(rows, -1, -1).gather(2, ranked.indices).flatten(1), chosen.flatten(1))
    flags[:, lines.number] = False
    return flags[:, of] if candidates == 1 else flags.gather(1, of)
