"""dense: every key at or before the query; and what a plan adds of it for a question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View


@dataclass(frozen=True, kw_only=True)
class Dense(HeadPattern):
    """Full causal attention; inside a layer of mixed heads, where SGLang's backends can't take some heads only."""

    kind: ClassVar[str] = "dense"

    def select(self, view: View) -> Selection:
        return Selection(everything=True)


@dataclass(frozen=True, kw_only=True)
class TextTail(HeadPattern):
    """In plans only: a chunk's last text queries with every key, for all heads (`sparse_prefill`, tail)."""

    kind: ClassVar[str] = "text_tail"

    def select(self, view: View) -> Selection:
        return Selection(everything=True)
