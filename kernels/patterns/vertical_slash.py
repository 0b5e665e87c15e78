"""vertical_slash: the columns and diagonals that the last queries look at (MInference; MMInference section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels.estimate.reference import column_mass, diagonal_mass
from mm_sglang.kernels.patterns.base import Chunk, HeadPattern, Selection, keep_nothing, require_at_least
from mm_sglang.kernels.select.reference import top_budget


@dataclass(frozen=True, kw_only=True)
class VerticalSlash(HeadPattern):
    """Top columns and top diagonals of the attention of the chunk's last queries.

    Query heads that share a KV head share their columns (the mean of their masses chooses), so that one reordering of
    that KV head's keys serves them all; diagonals are each head's own.

    Args:
        columns: key columns kept, the first `sink` among them. Default: 1000.
        slashes: diagonals kept, the nearest `local` among them. Default: 4096.
        sink: first positions that are always kept. Default: 30.
        local: nearest distances that are always kept, at least 1. Default: 100.
        last_q: queries of the estimate. Default: 64.
    """

    kind: ClassVar[str] = "vertical_slash"
    columns: int = 1000
    slashes: int = 4096
    sink: int = 30
    local: int = 100
    last_q: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "columns", "slashes", "local", "last_q")

    @property
    def probe(self) -> int:
        return self.last_q

    def select(self, chunk: Chunk, probe: torch.Tensor | None) -> Selection:
        assert probe is not None
        kept = keep_nothing(chunk)
        distance = torch.arange(chunk.keys, device=probe.device)
        kept.columns.copy_(top_budget(column_mass(probe, chunk.row), self.columns, distance < self.sink))
        kept.diagonals.copy_(top_budget(diagonal_mass(probe), self.slashes, distance < self.local))
        return kept
