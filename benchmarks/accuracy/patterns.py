"""Rivals that the product has no recipe for: tri-shape and the Sparse Transformer's two (MMInference, table 3).

"Fixed" and "strided" attend every stride-th key, which no budget can bring to another cost. Here they are thinned to
the density: of their columns or diagonals every n-th is kept, or, where there is room for more, each is widened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mm_sglang.kernels import classes
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.a_shape import nearest
from mm_sglang.kernels.patterns.base import HeadPattern, Selection, View
from mm_sglang.kernels.plan import BUCKET, Bands, device_ints

TEXT_STRIDE = 128  # where a prompt shows nothing


def stride_of(layout: TokenLayout) -> int:
    """Tokens of a frame, the largest if items differ: the stride and the window that the paper gives both."""
    return max((item.frame_tokens for item in classes.begun(layout)), default=TEXT_STRIDE)


@dataclass(frozen=True, kw_only=True)
class TriShape(HeadPattern):
    """A-shape, and the prompt's `last` queries with every key (TriangleMix; MMInference, table 3)."""

    kind: ClassVar[str] = "tri_shape"
    budgets: ClassVar[tuple[str, ...]] = ("local",)
    sink: int = 128
    local: int = 4096
    last: int = 128

    def select(self, view: View) -> Selection:
        at = torch.arange(view.queries, device=view.q.device)
        rows = (at >= view.queries - self.last).expand(len(view.kv_head), -1)
        return Selection(
            sink=self.sink, bands=nearest(view, self.local), rows=rows, rows_most=min(self.last, view.queries)
        )


@dataclass(frozen=True, kw_only=True)
class Strided(HeadPattern):
    """The last frame's worth of keys, and the keys a whole number of frames back (arXiv 1904.10509, "strided").

    Args:
        diagonals: distances kept, evenly spaced multiples of the stride; more than there are widens each of them.
    """

    kind: ClassVar[str] = "strided"
    budgets: ClassVar[tuple[str, ...]] = ("diagonals",)
    diagonals: int = 256

    def select(self, view: View) -> Selection:
        stride, keys = stride_of(view.layout), view.keys
        multiples = max(1, keys // stride)
        step, width = max(1, -(-multiples // self.diagonals)), max(1, self.diagonals // multiples)
        buckets = set(range(-(-min(stride, keys) // BUCKET)))
        for distance in range(step * stride, keys, step * stride):
            last = min(distance + width, keys) - 1
            buckets.update(range(distance // BUCKET, last // BUCKET + 1))
        heads = len(view.heads) * len(view.heads[0])
        index = device_ints(tuple(sorted(buckets, reverse=True)), view.q.device)
        count = torch.full((heads,), len(buckets), dtype=torch.int32, device=view.q.device)
        return Selection(bands=Bands(index=index.expand(heads, -1).contiguous(), count=count))


@dataclass(frozen=True, kw_only=True)
class Fixed(HeadPattern):
    """The last frame's worth of keys, and the last keys of every frame-sized block (arXiv 1904.10509, "fixed").

    Blocks begin at position 0, as in the original: they know nothing of where a video begins.

    Args:
        columns: keys kept for all queries; with fewer than there are blocks, every n-th block has one.
    """

    kind: ClassVar[str] = "fixed"
    budgets: ClassVar[tuple[str, ...]] = ("columns",)
    columns: int = 1024

    def select(self, view: View) -> Selection:
        stride, keys = stride_of(view.layout), view.keys
        blocks = max(1, -(-keys // stride))
        step, each = max(1, -(-blocks // self.columns)), min(max(1, self.columns // blocks), stride)
        at = torch.arange(keys, device=view.q.device)
        kept = (at % stride >= stride - each) & (at // stride % step == 0)
        return Selection(
            columns=kept.expand(len(view.kv_head), -1), columns_most=min(keys, -(-blocks // step) * each),
            bands=nearest(view, min(stride, keys)),
        )  # fmt: skip
