"""dense: every key at or before the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels.patterns.base import Chunk, HeadPattern, Selection, keep_nothing


@dataclass(frozen=True, kw_only=True)
class Dense(HeadPattern):
    """Full causal attention; inside a layer of mixed heads, where SGLang's backends can't take some heads only."""

    kind: ClassVar[str] = "dense"

    def select(self, chunk: Chunk, probe: torch.Tensor | None) -> Selection:
        kept = keep_nothing(chunk)
        kept.rows.fill_(True)
        return kept
