"""Context parallelism: which rank owns which rows of a batch's chunks. Pure functions.

A chunk is cut into blocks of TILE rows from its own start, the query tiles of a plan: one rank has all of a tile, and
its result cannot depend on how many ranks there are. Every block has an owner; the rest follows.

Legend: N ranks, M blocks of a chunk, T rows of the batch, W rows of the fullest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from mm_sglang.kernels.plan import TILE

KINDS = ("stripe", "zigzag")


def block_owners(blocks: int, size: int, kind: str, first: int = 0) -> torch.Tensor:
    """int64 [M]: the rank of each block of one chunk.

    stripe: rank (first + m) % N owns block m, which spreads a dense tail (a long question) over all ranks.
    zigzag: of 2N runs of blocks rank r owns run r and run 2N - 1 - r, SGLang's own order in whole blocks.

    Raises:
        ValueError: an unknown kind, or no ranks.
    """
    if size < 1:
        raise ValueError(f"size={size}: needs at least one rank")
    at = torch.arange(blocks)
    if kind == "stripe":
        return (first + at) % size
    if kind == "zigzag":
        run = at * (2 * size) // max(1, blocks)
        return torch.minimum(run, 2 * size - 1 - run)
    raise ValueError(f"kind={kind!r}: needs one of {KINDS}")


def blocks_of(rows: int) -> int:
    return -(-rows // TILE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sharding:
    """The chunks of a batch, one after another, cut over N ranks.

    Args:
        lengths: rows of each chunk.
        size: N.
        kind: see `block_owners`; stripes go on from chunk to chunk, so that many short ones are spread too.
    """

    lengths: tuple[int, ...]
    size: int
    kind: str

    @cached_property
    def owners(self) -> tuple[torch.Tensor, ...]:
        """int64 [M] of each chunk."""
        out, first = [], 0
        for length in self.lengths:
            out.append(block_owners(blocks_of(length), self.size, self.kind, first))
            first += blocks_of(length)
        return tuple(out)

    @cached_property
    def row_owner(self) -> torch.Tensor:
        """int64 [T]."""
        parts = [o.repeat_interleave(TILE)[:n] for o, n in zip(self.owners, self.lengths, strict=True)]
        return torch.cat(parts)

    def rows(self, rank: int) -> torch.Tensor:
        """int64: rows of the batch that a rank owns, ascending."""
        return torch.where(self.row_owner == rank)[0]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Rows of each rank."""
        total = torch.zeros(self.size, dtype=torch.int64)
        for owners, length in zip(self.owners, self.lengths, strict=True):
            rows = torch.full((len(owners),), TILE)
            rows[-1:] -= len(owners) * TILE - length
            total.index_add_(0, owners, rows)
        return tuple(total.tolist())

    def tiles(self, chunk: int, rank: int) -> tuple[int, ...]:
        """Blocks of a chunk that a rank owns."""
        return tuple(torch.where(self.owners[chunk] == rank)[0].tolist())

    def gathered(self, width: int, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """int64 [N * width]: batch row of each row of an all-gather of equal parts; T where one is filled up.

        Args:
            wanted: bool [T], the rows that are gathered; None: all.
        """
        total = len(self.row_owner)
        out = torch.full((self.size, width), total)
        for rank in range(self.size):
            own = self.rows(rank)
            own = own if wanted is None else own[wanted[own]]
            if len(own) > width:
                raise ValueError(f"width={width}: rank {rank} has {len(own)} rows: needs at least as many")
            out[rank, : len(own)] = own
        return out.flatten()

    def inverse(self, width: int) -> torch.Tensor:
        """int64 [T]: where each batch row lies in an all-gather of equal parts."""
        order = self.gathered(width)
        out = torch.empty(len(self.row_owner) + 1, dtype=torch.int64)
        out[order] = torch.arange(len(order))
        return out[:-1]


def turns(tiles: int, rank: int, size: int) -> tuple[int, ...]:
    """Tiles of a group whose queries are gathered from everywhere: every size-th from `rank` on, equally many a rank.

    The last ones may repeat; a tile computed twice is the same twice.
    """
    return tuple(min(rank + turn * size, tiles - 1) for turn in range(-(-tiles // size)))


def balance(costs: torch.Tensor, owners: torch.Tensor, size: int) -> float:
    """Greatest rank's cost over the mean, 1.0 at best.

    Args:
        costs: [M] of each block; owners: int64 [M].
    """
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, owners, costs.double())
    return float(total.max() / total.mean())
