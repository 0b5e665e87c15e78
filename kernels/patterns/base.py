"""HeadPattern: one query head's recipe; Selection: what a recipe keeps in one chunk.

Every pattern keeps whole query rows, whole key columns and whole diagonals; rows, columns and tiles of kept diagonals
are what the plan turns into a reordering and tile lists. A chunk's queries are positions [prefix, prefix + Nq), its
keys are positions [0, prefix + Nq).

Legend: R rows of the orders (one a KV head used by the group), G query heads of the group, Nq queries, Nk keys.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from mm_sglang.kernels.layout import TokenLayout

# Where a pattern's index breaks between modalities (MMInference section 3.3). Only "none" is in this version; "k", "q"
# and "2d" compose a pattern per modality pair and will live in patterns/boundary.py.
BOUNDARIES = ("none", "k", "q", "2d")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a pattern may look at: positions and layout of one chunk, and which KV head each head of the group reads."""

    layout: TokenLayout
    prefix: int
    queries: int
    row: torch.Tensor  # int64 [G]: row of the orders each head uses

    @property
    def keys(self) -> int:
        return self.prefix + self.queries

    @property
    def rows(self) -> int:
        return int(self.row.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Kept query rows [R, Nq] and key columns [R, Nk], and kept diagonals [G, Nk]: distance query - key. All bool."""

    rows: torch.Tensor
    columns: torch.Tensor
    diagonals: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class HeadPattern:
    """Base of the recipes; subclasses add budgets (in tokens) and `select`.

    Args:
        boundary: one of BOUNDARIES; only "none" is implemented.
    """

    kind: ClassVar[str]
    boundary: str = "none"

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary={self.boundary!r}: needs one of {BOUNDARIES}")
        if self.boundary != "none":
            raise ValueError(f"boundary={self.boundary!r} is not in this version: needs 'none'")

    @property
    def probe(self) -> int:
        """Last queries of the chunk whose attention `select` wants to see; 0 for a pattern without an estimate."""
        return 0

    def select(self, chunk: Chunk, probe: torch.Tensor | None) -> Selection:
        """What to keep in this chunk.

        Args:
            chunk: positions and layout.
            probe: attention weights of the last `self.probe` queries (fewer in a shorter chunk), fp32 [G, L, Nk].
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return {"pattern": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}


def require_at_least(pattern: HeadPattern, minimum: int, *names: str) -> None:
    """ValueError for budgets that are not whole numbers or are too small to mean anything."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{pattern.kind}: {name}={value!r}: needs a whole number of at least {minimum}")


def keep_nothing(chunk: Chunk) -> Selection:
    """An empty Selection of the chunk's shapes, for a pattern to fill in."""
    device = chunk.layout.coordinates.device
    return Selection(
        rows=torch.zeros(chunk.rows, chunk.queries, dtype=torch.bool, device=device),
        columns=torch.zeros(chunk.rows, chunk.keys, dtype=torch.bool, device=device),
        diagonals=torch.zeros(len(chunk.row), chunk.keys, dtype=torch.bool, device=device),
    )
