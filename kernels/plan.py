"""Plan: what an engine runs for one layer and one chunk. A reordering plus tile lists per group of heads.

Legend: G query heads of a group, R orders (one a KV head the group uses), Mq and Mk tiles of queries and keys,
W list width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mm_sglang.kernels.patterns.base import HeadPattern, Selection
from mm_sglang.kernels.permute.reference import PAD, TILE, kept_first


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadGroup:
    """Heads that share one recipe. Tile lists hold key-tile numbers of the reordered keys, ascending, then zeros.

    A tile on the *full* list is visible to every query of its row, so no position is read; only *partial* tiles test
    key position <= query position, element by element. A tile on neither list is not computed.
    """

    pattern: HeadPattern
    heads: torch.Tensor  # int64 [G] query heads
    row: torch.Tensor  # int64 [G] which order each head uses
    kv_head: torch.Tensor  # int64 [R] KV head behind each order
    q_order: torch.Tensor  # int32 [R, Mq * TILE] positions, PAD at the end
    k_order: torch.Tensor  # int32 [R, Mk * TILE]
    full_count: torch.Tensor  # int32 [G, Mq]
    full_index: torch.Tensor  # int32 [G, Mq, W]
    partial_count: torch.Tensor
    partial_index: torch.Tensor

    @property
    def tiles(self) -> int:
        """Tiles computed, all heads."""
        return int(self.full_count.sum() + self.partial_count.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Every query head of a layer, in one or more groups, for queries [prefix, prefix + queries)."""

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

    def density(self, group: HeadGroup) -> float:
        """Tiles computed over tiles of dense causal attention, for the heads of one group."""
        return group.tiles / (self.causal_tiles * len(group.heads))

    def tile_map(self, group: HeadGroup, index: int) -> torch.Tensor:
        """Head `group.heads[index]`'s tiles as uint8 [Mq, Mk]: 0 not computed, 1 partial, 2 full."""
        out = torch.zeros(group.full_index.shape[1], group.k_order.shape[1] // TILE, dtype=torch.uint8)
        for value, count, listed in (
            (1, group.partial_count[index], group.partial_index[index]),
            (2, group.full_count[index], group.full_index[index]),
        ):
            for m, n in enumerate(count.tolist()):
                out[m, listed[m, :n].long().cpu()] = value
        return out

    def attended(self, head: int) -> torch.Tensor:
        """Bool [queries, keys] of one query head in prompt order: exactly what the engine attends."""
        for group in self.groups:
            if head in group.heads.tolist():
                index = group.heads.tolist().index(head)
                break
        else:
            raise ValueError(f"head={head}: the plan holds heads 0..{self.heads - 1}")
        q_pos, k_pos = (o[group.row[index]].long().cpu() for o in (group.q_order, group.k_order))
        tiles = self.tile_map(group, index)
        seen = tiles.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        visible = (seen == 2) | ((seen == 1) & (k_pos[None, :] <= q_pos[:, None]))
        out = torch.zeros(self.queries, self.keys, dtype=torch.bool)
        real = visible[: self.queries, : self.keys]  # both orders hold their padding at the end
        out[q_pos[: self.queries, None] - self.prefix, k_pos[None, : self.keys]] = real
        return out

    def check(self) -> None:
        """ValueError if an invariant does not hold: for plans from elsewhere, and for tests of every builder."""
        seen: list[int] = sorted(h for g in self.groups for h in g.heads.tolist())
        if seen != list(range(self.heads)):
            raise ValueError(f"groups hold heads {seen}: needs each of 0..{self.heads - 1} once")
        for g in self.groups:
            for name, order, start, count in (
                ("q_order", g.q_order, self.prefix, self.queries),
                ("k_order", g.k_order, 0, self.keys),
            ):
                real = order[:, :count].sort(1).values
                want = torch.arange(start, start + count, device=order.device, dtype=order.dtype)
                if (
                    order.shape[1] != -(-count // TILE) * TILE
                    or not (real == want).all()
                    or (order[:, count:] != PAD).any()
                ):
                    raise ValueError(f"{name}: needs each position of [{start}, {start + count}) once, then {PAD}")
            q_low, q_high = _hull(g.q_order)
            k_low, k_high = _hull(g.k_order)
            listed = torch.zeros(len(g.heads), q_low.shape[1], k_low.shape[1], dtype=torch.int8, device=q_low.device)
            for name, counts, index in (
                ("full", g.full_count, g.full_index),
                ("partial", g.partial_count, g.partial_index),
            ):
                valid = torch.arange(index.shape[2], device=index.device) < counts[..., None]
                if ((index.diff(dim=2) <= 0) & valid[..., 1:]).any():
                    raise ValueError(f"{name}_index: needs ascending tile numbers without repeats")
                listed.scatter_add_(2, index.long(), valid.to(torch.int8))
                if name == "full":
                    whole = (k_high[:, None, :] <= q_low[:, :, None]) & (g.k_order[:, TILE - 1 :: TILE] != PAD)[
                        :, None, :
                    ]
                    if ((listed > 0) & ~whole[g.row]).any():
                        raise ValueError("full_index: holds a tile with a key that some query of its row must not see")
            if (listed > 1).any():
                raise ValueError("full_index, partial_index: a tile is listed twice, its keys would count twice")


def _hull(order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest real position of each tile of an order, int64 [R, M] each."""
    tiles = order.long().view(len(order), -1, TILE)
    return tiles.amin(2), tiles.masked_fill(tiles == PAD, -1).amax(2)


def _compact(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [G, Mq, Mk] as counts int32 [G, Mq] and ascending lists int32 [G, Mq, W], W the longest one's."""
    count = chosen.sum(2, dtype=torch.int32)
    width = max(int(count.max()), 1)
    slot = torch.where(chosen, torch.cumsum(chosen, 2) - 1, width)  # what is not chosen goes to a slot that is cut off
    index = torch.zeros(*chosen.shape[:2], width + 1, dtype=torch.int32, device=chosen.device)
    number = torch.arange(chosen.shape[2], dtype=torch.int32, device=chosen.device)
    return count, index.scatter_(2, slot, number.expand_as(slot))[..., :width]


def head_group(
    pattern: HeadPattern, heads: torch.Tensor, row: torch.Tensor, kv_head: torch.Tensor, kept: Selection, prefix: int
) -> HeadGroup:
    """Turn kept rows, columns and diagonals into orders and tile lists.

    A tile is computed if it holds a kept row or a kept column, or if a kept diagonal runs through its hull (smallest
    to largest position of its queries and of its keys); it is dropped if its smallest key is later than its largest
    query. So what is attended is the kept set rounded outward to whole tiles, never less.
    """
    q_order, k_order = kept_first(kept.rows, prefix), kept_first(kept.columns, 0)
    q_low, q_high = (x[row][:, :, None] for x in _hull(q_order))  # [G, Mq, 1]
    k_low, k_high = (x[row][:, None, :] for x in _hull(k_order))  # [G, 1, Mk]

    row_tile = torch.arange(q_order.shape[1] // TILE, device=q_order.device) * TILE < kept.rows.sum(1)[row][:, None]
    column_tile = (
        torch.arange(k_order.shape[1] // TILE, device=k_order.device) * TILE < kept.columns.sum(1)[row][:, None]
    )

    # kept diagonals with a distance in [q_low - k_high, q_high - k_low], by prefix sums
    before = torch.nn.functional.pad(torch.cumsum(kept.diagonals, 1), (1, 0))  # [G, Nk + 1]
    far = (q_high - k_low + 1).clamp(min=0)
    near = (q_low - k_high).clamp(min=0)
    flat = far.shape[0], -1
    crossed = before.gather(1, far.reshape(flat)) > before.gather(1, near.reshape(flat))

    reached = k_low <= q_high
    chosen = reached & (row_tile[:, :, None] | column_tile[:, None, :] | crossed.view_as(far))
    padded = (k_order[:, TILE - 1 :: TILE] == PAD)[row][:, None, :]
    full = chosen & (k_high <= q_low) & ~padded
    full_count, full_index = _compact(full)
    partial_count, partial_index = _compact(chosen & ~full)
    return HeadGroup(
        pattern=pattern,
        heads=heads,
        row=row,
        kv_head=kv_head,
        q_order=q_order,
        k_order=k_order,
        full_count=full_count,
        full_index=full_index,
        partial_count=partial_count,
        partial_index=partial_index,
    )
