"""a_shape: the first keys and the nearest keys (StreamingLLM; MMInference table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels.patterns.base import Chunk, HeadPattern, Selection, keep_nothing, require_at_least


@dataclass(frozen=True, kw_only=True)
class AShape(HeadPattern):
    """Keys [0, sink) and the `local` nearest keys, the query itself among them.

    Args:
        sink: first positions, in tokens. Default: 128.
        local: nearest positions, in tokens, at least 1. Default: 4096.
    """

    kind: ClassVar[str] = "a_shape"
    sink: int = 128
    local: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "local")

    def select(self, chunk: Chunk, probe: torch.Tensor | None) -> Selection:
        kept = keep_nothing(chunk)
        kept.columns[:, : self.sink] = True
        kept.diagonals[:, : self.local] = True
        return kept
