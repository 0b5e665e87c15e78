"""A prefill batch whose rows are spread over ranks: K and V of all of them everywhere, queries where they are owned.

All ranks make the same whole plan of each chunk, from the same keys and the same sampled queries, and share out what is
dear in it, the masses over all keys (kernels/share.py); each runs the query tiles that it owns. That makes plan and
output independent of the number of ranks. Queries that a recipe gathers (a grid's whole rows,
the rarer class of a q or 2d boundary) form tiles of rows of many owners: those tiles go round the ranks in turn and
their output is gathered, which costs those queries (queries.py) and the output of those tiles, in bytes moved.

Legend: N ranks, T rows of the batch, W rows of a rank filled up, H and Hkv heads, D head dimension, P rows of the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mm_sglang.batches import SparseChunk
from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.context_parallel.queries import Needed, pieces, wanted
from mm_sglang.kernels.layout import upload
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.plan import TILE, HeadGroup, device_ints, head_numbers
from mm_sglang.kernels.share import some_tiles
from mm_sglang.parallel.sharding import Sharding, turns


@dataclass(kw_only=True, eq=False)
class SharedBatch:
    """What the layers of one batch have in common.

    width: W.
    rows: int64, the batch rows that this rank owns.
    slots: int64 [N * W] row of the pool for each row of an all-gather; what fills up goes to 0, SGLang's dummy row.
    tail: of `sparse_prefill`.
    """

    ranks: Ranks
    sharding: Sharding
    width: int
    chunks: Sequence[SparseChunk]
    rows: torch.Tensor
    slots: torch.Tensor
    tail: int
    _fetches: dict[Needed, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        ranks: Ranks,
        sharding: Sharding,
        width: int,
        chunks: Sequence[SparseChunk],
        out_cache_loc: torch.Tensor,
        tail: int = 0,
    ) -> SharedBatch:
        """out_cache_loc: [T] row of the pool for each row of the batch."""
        device = out_cache_loc.device
        order = upload(sharding.gathered(width), device)
        return cls(
            ranks=ranks, sharding=sharding, width=width, chunks=chunks, rows=upload(sharding.rows(ranks.rank), device),
            slots=torch.nn.functional.pad(out_cache_loc.long(), (0, 1)).index_select(0, order), tail=tail,
        )  # fmt: skip

    def start(self, x: torch.Tensor, pool: torch.Tensor) -> Callable[[], None]:
        """Starts to gather keys or values [W, Hkv, D]; a call that finishes them in the pool [P, Hkv, D], once."""
        waiting = [self.ranks.gather(x)]

        def finish() -> None:
            if waiting:
                _wide(pool).index_copy_(0, self.slots, _wide(waiting.pop()()))

        return finish

    def start_queries(
        self, q: torch.Tensor, recipes: Sequence[Sequence[HeadPattern]]
    ) -> Callable[[], torch.Tensor]:  # fmt: skip
        """Starts to gather those of q [W, H, D] that recipes of other ranks look at; before the keys, as they are few.

        Args:
            recipes: of each chunk.

        Returns:
            A call that gives [T + 1, H, D]: this rank's queries in place, and those of others that are looked at. All
            other rows are whatever the memory held, and nobody reads them: to write zeros there would hold up the
            gather of keys.
        """
        waiting = []
        for heads, needed in pieces(recipes, self.chunks, self.sharding.lengths, self.tail):
            send, place = self._fetch(needed, q.device)
            at = device_ints(heads, q.device).long()
            waiting.append((place, at, self.ranks.gather(q.index_select(0, send).index_select(1, at))))

        def finish() -> torch.Tensor:
            out = q.new_empty(sum(self.sharding.lengths) + 1, *q.shape[1:])
            _wide(out).index_copy_(0, self.rows, _wide(q[: len(self.rows)]))
            for place, at, gathered in waiting:
                out[place[:, None], at] = gathered()
            return out

        return finish

    def _fetch(self, needed: Needed, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of q that this rank sends, and where the gathered ones belong (T: nowhere); kept for all layers."""
        if needed not in self._fetches:
            sharding = self.sharding
            rows = wanted(needed, self.chunks, sharding.lengths)
            width = max(int(rows[sharding.rows(rank)].sum()) for rank in range(self.ranks.size))
            send = torch.zeros(width, dtype=torch.int64)
            own = torch.where(rows[sharding.rows(self.ranks.rank)])[0]
            send[: len(own)] = own
            self._fetches[needed] = upload(send, device), upload(sharding.gathered(width, rows), device)
        return self._fetches[needed]

    def local(self, out: torch.Tensor) -> torch.Tensor:
        """This rank's rows of [T + 1, H, D], filled up with zeros to [W, H, D]."""
        own = out.index_select(0, self.rows)
        missing = self.width - len(own)
        return torch.nn.functional.pad(own, (0, 0, 0, 0, 0, missing)) if missing else own


def _wide(rows: torch.Tensor) -> torch.Tensor:
    """[P, H, D] as int64 [P, E]: index_copy_ moves an element a thread, two bytes of it at 0.46 TB/s, eight at 1.24."""
    return rows.view(len(rows), rows.shape[1] * rows.shape[2]).view(torch.int64)


@dataclass(kw_only=True, eq=False)
class ChunkShare:
    """kernels.share.Share of one chunk of the batch.

    Args:
        chunk: its number; start: its first row; out: [T + 1, H, D] of the whole batch, whose last row is no query's.
        values: finishes the value pool; only its first call does anything.
    """

    batch: SharedBatch
    chunk: int
    start: int
    out: torch.Tensor
    values: Callable[[], None]

    @property
    def team(self) -> Ranks:
        return self.batch.ranks

    def begin(self, group: HeadGroup) -> HeadGroup | None:
        self.values()
        ranks = self.batch.ranks
        if group.q_order is not None:
            return some_tiles(group, self._turn(group, ranks.rank))
        self._complete_scores(group)
        tiles = self.batch.sharding.tiles(self.chunk, ranks.rank)
        if not tiles:
            return None
        at = device_ints(tiles, group.limits.device).long()
        return some_tiles(group, at.expand(len(group.kv_head), -1))

    def _turn(self, group: HeadGroup, rank: int) -> torch.Tensor:
        at = device_ints(turns(group.query_tiles, rank, self.batch.ranks.size), group.limits.device).long()
        return at.expand(len(group.kv_head), -1)

    def _complete_scores(self, group: HeadGroup) -> None:
        """Pooled queries of others' tiles, so that the plan is the whole one here too, for metrics and traces."""
        for pooled in (s.blocks.q for s in group.segments if s.blocks is not None):  # [G, Mq, E]
            ranks, tiles = self.batch.ranks, pooled.shape[1]
            own = [self.batch.sharding.tiles(self.chunk, rank) for rank in range(ranks.size)]
            most = max(map(len, own))
            place = device_ints(tuple(n for t in own for n in (*t, *[tiles] * (most - len(t)))), pooled.device)
            mine = place.view(ranks.size, most)[ranks.rank].clamp(max=tiles - 1)
            gathered = ranks.gather(pooled.index_select(1, mine).transpose(0, 1))()  # [N * most, G, E]
            room = pooled.new_empty(tiles + 1, len(pooled), pooled.shape[2])
            pooled.copy_(room.index_copy_(0, place.long(), gathered)[:-1].transpose(0, 1))

    def end(self, group: HeadGroup, out: torch.Tensor) -> None:
        """A group of gathered queries: every rank's tiles, into all ranks' outputs."""
        if group.q_order is None:
            return
        ranks, count = self.batch.ranks, len(group.kv_head)
        heads = head_numbers(group.heads, group.limits.device).long().view(count, -1, 1)  # [R, g, 1]
        at = torch.stack([self._turn(group, rank) for rank in range(ranks.size)])  # [N, R, n]
        order = group.q_order.view(count, -1, TILE).expand(ranks.size, -1, -1, -1)
        rows = order.gather(2, at[..., None].expand(-1, -1, -1, TILE)).flatten(2)[:, :, None]  # [N, R, 1, n * T]
        rows = (rows.long() - group.prefix + self.start).expand(-1, -1, heads.shape[1], -1)
        nowhere = len(self.out) - 1
        place = torch.where((rows < nowhere) & (heads >= 0), rows, nowhere)  # PAD lies above all rows
        heads = heads.clamp(min=0)
        mine = self.out[place[ranks.rank], heads]  # [R, g, n * T, D]
        self.out[place, heads] = ranks.gather(mine)().view(ranks.size, *mine.shape)
