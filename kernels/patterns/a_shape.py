"""a_shape: the first keys and the nearest keys (StreamingLLM; MMInference table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View, require_at_least
from mm_sglang.kernels.plan import BUCKET, Bands


@dataclass(frozen=True, kw_only=True)
class AShape(HeadPattern):
    """Keys [0, sink) and the `local` nearest keys, the query itself among them.

    Args:
        sink: first positions, in tokens. Default: 128.
        local: nearest positions, in tokens, at least 1. Default: 4096.
    """

    kind: ClassVar[str] = "a_shape"
    budgets: ClassVar[tuple[str, ...]] = ("local",)
    sink: int = 128
    local: int = 4096

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "local")

    def select(self, view: View) -> Selection:
        return Selection(sink=self.sink, bands=nearest(view, self.local))


def nearest(view: View, local: int) -> Bands:
    """The buckets of the `local` nearest distances, for every head."""
    heads, width = len(view.heads) * len(view.heads[0]), min(-(-local // BUCKET), -(-view.keys // BUCKET))
    index = torch.arange(width - 1, -1, -1, dtype=torch.int32, device=view.q.device)
    count = torch.full((heads,), width, dtype=torch.int32, device=view.q.device)
    return Bands(index=index.expand(heads, -1).contiguous(), count=count)
