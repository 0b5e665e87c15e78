"""Looking into plans: tile maps, attended sets and invariants, for reports, pictures and tests (on the host)."""

from __future__ import annotations

import torch

from mm_sglang.kernels.patterns.base import HeadPattern
from mm_sglang.kernels.plan import PAD, TILE, HeadGroup, Plan


def tile_counts(group: HeadGroup) -> tuple[int, int]:
    """Tiles computed by all heads of a group, and how many of them are partial."""
    full = partial = 0
    for first, last in group.slices():
        lists = group.lists(first, last)
        full += int(lists.full_count.sum())
        partial += int(lists.partial_count.sum())
    return full + partial, partial


def tile_counts_on_device(plan: Plan) -> torch.Tensor:
    """int64 []: tiles computed by all heads of a plan, without waiting for the device."""
    counts = [lists.full_count.sum() + lists.partial_count.sum() for group in plan.groups
              for first, last in group.slices() for lists in (group.lists(first, last),)]  # fmt: skip
    return torch.stack(counts).sum()


def tiles_by_head(plan: Plan) -> list[int]:
    """Tiles computed by each query head; waits for the device once."""
    heads, counts = [], []
    for group in plan.groups:
        for first, last in group.slices():
            lists = group.lists(first, last)
            heads += [h for row in group.heads for h in row]
            counts.append((lists.full_count + lists.partial_count).sum(1))
    tiles = [0] * plan.heads
    for head, count in zip(heads, torch.cat(counts).tolist(), strict=True):
        if head >= 0:
            tiles[head] += int(count)
    return tiles


def density(plan: Plan) -> float:
    """Tiles computed over those of dense causal attention, all heads; waits for the device once."""
    return sum(tiles_by_head(plan)) / (plan.causal_tiles * plan.heads)


def attended_shares(lse: torch.Tensor, dense_lse: torch.Tensor) -> torch.Tensor:
    """fp32 [H, L]: share of the dense softmax that was attended, from the log-sum-exps [H, L] of the same queries.

    A pooled residual can exceed the keys that it stands for, hence the bound.
    """
    return (lse - dense_lse).exp().clamp(max=1.0)


def recall(lse: torch.Tensor, dense_lse: torch.Tensor) -> torch.Tensor:
    """fp32 [H]: mean of `attended_shares`."""
    return attended_shares(lse, dense_lse).mean(1)


def by_pattern(plan: Plan) -> list[tuple[HeadPattern, list[int], int, int]]:
    """(recipe, its heads, tiles, partial tiles) of every recipe of a plan, its groups taken together."""
    rows: dict[HeadPattern, tuple[list[int], int, int]] = {}
    for group in plan.groups:
        heads, tiles, partial = rows.get(group.pattern, (group.members, 0, 0))
        own = tile_counts(group)
        rows[group.pattern] = heads, tiles + own[0], partial + own[1]
    return [(pattern, *row) for pattern, row in rows.items()]


def tile_map(group: HeadGroup, head: int) -> torch.Tensor:
    """One query head's tiles as uint8 [Mq, Mk] on the CPU: 0 not computed, 1 partial, 2 full."""
    flat = [h for row in group.heads for h in row]
    lists, index = group.lists(), flat.index(head)
    out = torch.zeros(group.query_tiles, group.key_tiles, dtype=torch.uint8, device=lists.full_index.device)
    rows = torch.arange(group.query_tiles, device=out.device)[:, None]
    for value, count, listed in (
        (1, lists.partial_count[index], lists.partial_index[index]),
        (2, lists.full_count[index], lists.full_index[index]),
    ):
        held = torch.arange(listed.shape[1], device=out.device) < count[:, None]
        out[rows.expand_as(held)[held], listed[held].long()] = value
    return out.cpu()


def attended(plan: Plan, head: int) -> torch.Tensor:
    """Bool [queries, keys] of one query head in prompt order, on the CPU: exactly what an engine attends."""
    out = torch.zeros(plan.queries, plan.keys, dtype=torch.bool)
    found = False
    for group in plan.groups:
        for r, row in enumerate(group.heads):
            if head in row:
                found = True
                q_pos, k_pos = group.q_positions()[r].long().cpu(), group.k_positions()[r].long().cpu()
                seen = tile_map(group, head).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
                visible = (seen == 2) | ((seen == 1) & (k_pos[None] <= q_pos[:, None]))
                real_q, real_k = q_pos != PAD, k_pos != PAD
                rows = torch.zeros(int(real_q.sum()), plan.keys, dtype=torch.bool)
                rows[:, k_pos[real_k]] = visible[real_q][:, real_k]
                out[q_pos[real_q] - plan.prefix] = rows
    if not found:
        raise ValueError(f"head={head}: the plan holds heads 0..{plan.heads - 1}")
    return out


def check(plan: Plan) -> None:
    """ValueError if an invariant of HeadGroup or TileLists does not hold: for plans from elsewhere, and for tests."""
    owned = torch.zeros(plan.heads, plan.queries, dtype=torch.bool)
    for group in plan.groups:
        lists = group.lists()
        for r, row in enumerate(group.heads):
            q_pos, k_pos = group.q_positions()[r].long().cpu(), group.k_positions()[r].long().cpu()
            real = k_pos[k_pos != PAD].sort().values
            if not torch.equal(real, torch.arange(plan.keys)):
                raise ValueError(f"k_order: needs each position of [0, {plan.keys}) once, the rest {PAD}")
            real = q_pos[q_pos != PAD]
            if (real.sort().values.diff() == 0).any() or (real < plan.prefix).any() or (real >= plan.keys).any():
                raise ValueError(f"q_order: needs positions of [{plan.prefix}, {plan.keys}) at most once each")
            q_low = q_pos.view(-1, TILE).amin(1)
            k_high = k_pos.view(-1, TILE).amax(1)  # PAD counts as a key later than every query
            for i, head in enumerate(row):
                if head < 0:
                    continue
                owned[head, real - plan.prefix] = True
                listed = torch.zeros(group.query_tiles, group.key_tiles, dtype=torch.int32)
                for name, counts, index in (
                    ("full", lists.full_count, lists.full_index),
                    ("partial", lists.partial_count, lists.partial_index),
                ):
                    for m, n in enumerate(counts[r * len(row) + i].tolist()):
                        tiles = index[r * len(row) + i, m, :n].long().cpu()
                        if (tiles.diff() <= 0).any():
                            raise ValueError(f"{name}_index: needs ascending tile numbers without repeats")
                        listed[m, tiles] += 1
                        if name == "full" and (k_high[tiles] > q_low[m]).any():
                            raise ValueError(
                                "full_index: holds a tile with a key that some query of its row must not see"
                            )
                if (listed > 1).any():
                    raise ValueError("full_index, partial_index: a tile is listed twice, its keys would count twice")
    if not owned.all():
        raise ValueError(f"groups leave queries out: needs each of {plan.queries} for each of {plan.heads} heads")
