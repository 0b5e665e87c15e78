"""Plan: what an engine runs for one layer and one chunk: per group of heads a reordering and lists of tiles.

The keys of a group are laid out in *segments*, each ascending in position and starting at a multiple of TILE slots:
segment 0 holds kept columns, the others hold the rest. A key has one slot, so no key can count twice, whatever
overlaps; and because a segment ascends, "which of its keys may this query see" is one number, `limits`: the slots
below it. Tiles wholly below every row's limit are *full*, tiles above all limits are dropped, and only the few
between are *partial*: there, and nowhere else, the limit is tested.

Legend: R orders (rows: KV heads of a group), g query heads of each, G = R * g, S segments, T = TILE,
Mq and Mk tiles of queries and keys, Nq queries, Nk keys, W width of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mm_sglang.kernels.patterns.base import HeadPattern

TILE = 128  # queries and keys of a tile: FA4's on SM90, where 128 x 128 is the size that ran at dense speed
BUCKET = 64  # neighbouring diagonals that are chosen together: one diagonal of a tile brings 127 others anyway
# Means of queries, and of keys, that stand for a tile where blocks are scored by clusters. One mean loses what few of
# its rows look at or hold. At 64K tokens and a tenth of the tiles four clusters of keys kept 0.86 of a prompt's
# attention, eight 0.87, means of four runs of keys 0.77, the best choice of as many tiles 0.90.
PARTS = 4
EMPTY = -1e30  # log of the number of keys in a cluster without any: finite, so that no difference of two is NaN
PAD = 2**31 - 1  # position in a slot or row that holds no token
# Tile lists that may exist at once; longer query ranges are planned and attended in slices. Small, for the L2 cache:
# rows of one launch walk the keys at one pace and share what they read, but drift apart while it lasts (719 -> 660 ms
# for random blocks at 1M tokens against 256 MiB, nothing lost elsewhere).
LIST_BYTES = 16 << 20
SLICE_TILES = 2048  # query tiles, over all heads, that a slice has at least: 15 rounds of the 132 processors


@lru_cache(maxsize=512)
def device_ints(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 tensor of host numbers, copied without waiting and kept, so that planning never synchronises."""
    host = torch.tensor(values, dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def evenly(total: int, most: int) -> tuple[int, ...]:
    """`most` of the numbers below `total`, or all if they are fewer, evenly spread up to the last one."""
    count = min(most, total)
    return tuple((n + 1) * total // count - 1 for n in range(count))


def head_numbers(heads: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """int32 [R * g]: HeadGroup.heads, row after row, fillers included."""
    return device_ints(tuple(head for row in heads for head in row), device)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bands:
    """Kept buckets of diagonals: bucket b is the distances query - key in [b * BUCKET, (b + 1) * BUCKET).

    index int32 [G, L], from far to near, of which the first `count` (int32 [G]) are meant.
    """

    index: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Blocks:
    """Block scores still to be chosen from: pooled queries [G, Mq, E] and pooled keys [R, Mks, E] of one segment.

    Per query tile, the `keep` key tiles of greatest score q . k * scale (softmax over the tiles it may see), fewer if
    a share `coverage` of that softmax is reached before, and none that holds less than `least` of it; the segment's
    first `sink` tiles and the `local` tiles that end at the query's own are forced, and count. With several `parts`, E
    holds a row for each: then the softmax is the mean of those of all parts of queries, each over
    logsumexp_b(q_a . k_b * scale + weight_b), and the score its logarithm; weight fp32 [R, Mks, parts], None: zeros.
    """

    q: torch.Tensor
    k: torch.Tensor
    scale: float
    keep: int
    coverage: float | None
    sink: int
    local: int
    parts: int = 1
    weight: torch.Tensor | None = None
    least: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """What of a segment is attended: all of it (both None), the tiles that bands run through, or the best blocks."""

    bands: Bands | None = None
    blocks: Blocks | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TileLists:
    """Key tiles of query tiles [first, first + Mq) of one group, as numbers of its key order, ascending.

    Counts are int32 [G, Mq], lists int32 [G, Mq, W]; entries past the count are undefined. A tile stands on one list
    at most.
    """

    first: int
    full_count: torch.Tensor
    full_index: torch.Tensor
    partial_count: torch.Tensor
    partial_index: torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadGroup:
    """Query heads that share one recipe, and the queries for which it is meant.

    Args:
        pattern: the recipe.
        heads: [R][g] query heads by order; -1 fills up where a KV head has fewer than g of them here.
        kv_head: [R] the KV head behind each order.
        q_order: int32 [R, Mq * T] positions of the group's queries, PAD at the end; None: the chunk's, in order.
        k_order: int32 [R, Mk * T] position in each slot, PAD between segments; None: slot n holds position n.
        start: int32 [R, S + 1] first slot of each segment, and the end of the last.
        rank: int32 [R, S, Nk + 1] keys of a segment at positions below n; None with k_order None.
        limits: int32 [R, S, Mq * T]: slots of segment s below limits[s] hold keys at or before that query; -1 for rows
            without a query.
        segments: S of them.
        width: no query tile lists more tiles than this.
        everything: every visible key is attended (segments say so too): an engine may run its dense kernel.
    """

    pattern: HeadPattern
    prefix: int
    queries: int
    heads: tuple[tuple[int, ...], ...]
    kv_head: tuple[int, ...]
    q_order: torch.Tensor | None
    k_order: torch.Tensor | None
    start: torch.Tensor
    rank: torch.Tensor | None
    limits: torch.Tensor
    segments: tuple[Segment, ...]
    width: int
    tile_lists: Callable[[HeadGroup, int, int], TileLists]
    everything: bool = False

    @property
    def query_tiles(self) -> int:
        return self.limits.shape[2] // TILE

    @property
    def keys(self) -> int:
        return self.prefix + self.queries

    @property
    def key_tiles(self) -> int:
        return -(-self.keys // TILE) if self.k_order is None else self.k_order.shape[1] // TILE

    @property
    def members(self) -> list[int]:
        """The query heads, fillers left out."""
        return [h for row in self.heads for h in row if h >= 0]

    def q_positions(self) -> torch.Tensor:
        """int32 [R, Mq * T]: q_order, written out where it is None."""
        if self.q_order is not None:
            return self.q_order
        return in_order(self.prefix, self.queries, self.limits.device).expand(len(self.kv_head), -1)

    def k_positions(self) -> torch.Tensor:
        """int32 [R, Mk * T]: k_order, written out where it is None."""
        if self.k_order is not None:
            return self.k_order
        return in_order(0, self.keys, self.limits.device).expand(len(self.kv_head), -1)

    def lists(self, first: int = 0, last: int | None = None) -> TileLists:
        """Tiles of query tiles [first, last)."""
        return self.tile_lists(self, first, self.query_tiles if last is None else last)

    def slices(self) -> Iterator[tuple[int, int]]:
        """Ranges of query tiles whose lists fit LIST_BYTES, or of SLICE_TILES."""
        heads = len(self.heads) * len(self.heads[0])
        step = max(LIST_BYTES // (8 * heads * self.width), -(-SLICE_TILES // heads))
        for first in range(0, self.query_tiles, step):
            yield first, min(first + step, self.query_tiles)

    def rows(self, first: int, last: int) -> HeadGroup:
        """The same for orders [first, last) only: views, nothing is computed again."""
        g = len(self.heads[0])

        def cut(segment: Segment) -> Segment:
            bands, blocks = segment.bands, segment.blocks
            if bands is not None:
                bands = Bands(index=bands.index[first * g : last * g], count=bands.count[first * g : last * g])
            if blocks is not None:
                weight = None if blocks.weight is None else blocks.weight[first:last]
                blocks = replace(blocks, q=blocks.q[first * g : last * g], k=blocks.k[first:last], weight=weight)
            return Segment(bands=bands, blocks=blocks)

        return replace(
            self,
            heads=self.heads[first:last],
            kv_head=self.kv_head[first:last],
            q_order=None if self.q_order is None else self.q_order[first:last],
            k_order=None if self.k_order is None else self.k_order[first:last],
            start=self.start[first:last],
            rank=None if self.rank is None else self.rank[first:last],
            limits=self.limits[first:last],
            segments=tuple(cut(s) for s in self.segments),
        )


def in_order(start: int, count: int, device: torch.device) -> torch.Tensor:
    """int32 [M * T]: positions [start, start + count), PAD to the end of the last tile."""
    order = torch.full((-(-count // TILE) * TILE,), PAD, dtype=torch.int32, device=device)
    order[:count] = torch.arange(start, start + count, dtype=torch.int32, device=device)
    return order


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Every query head of a layer for queries [prefix, prefix + queries), in groups that run in order.

    A query and head that stand in two groups belong to the later one: an engine overwrites the earlier result.
    """

    prefix: int
    queries: int
    heads: int
    groups: tuple[HeadGroup, ...]

    @property
    def keys(self) -> int:
        return self.prefix + self.queries

    @property
    def causal_tiles(self) -> int:
        """Tiles that dense causal attention computes for one head in prompt order."""
        last = [min(self.prefix + (m + 1) * TILE, self.keys) - 1 for m in range(-(-self.queries // TILE))]
        return sum(position // TILE + 1 for position in last)
