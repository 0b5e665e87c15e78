"""Sampled rows: what a plan attends of a few queries, and what an exact softmax over it gives; at any length.

Legend: n sampled rows, H query heads, Nk keys, D head dimension, T = TILE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mm_sglang.kernels.plan import PAD, TILE, HeadGroup, Plan, TileLists

WRONG = 999.0  # as an error ratio: not worth a number


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A plan's tiles, and what it attends of sampled rows.

    masks: bool [H, n, Nk] in prompt order. tiles, partial: number of tiles computed, and partial ones among them.
    future: full tiles' keys that a sampled row must not see (has to be 0).
    """

    masks: torch.Tensor
    tiles: int
    partial: int
    future: int


def sample(queries: int, prefix: int, count: int, seed: int, *, late: bool) -> torch.Tensor:
    """Up to `count` ascending positions of the chunk's queries: of its second half if `late`, else with both ends."""
    first = queries // 2 if late else 0
    picked = torch.randperm(queries - first, generator=torch.Generator().manual_seed(seed))[:count] + first
    if not late:
        picked = torch.cat([picked, torch.tensor([0, queries - 1])])
    return torch.tensor(sorted(set(picked.tolist()))) + prefix


def look(plan: Plan, positions: torch.Tensor) -> Seen:
    """One pass over the lists that the engine runs.

    Args:
        positions: int64 [n] positions of queries, ascending, on the plan's device.
    """
    masks = torch.zeros(plan.heads, len(positions), plan.keys, dtype=torch.bool, device=positions.device)
    full, partial, future = (torch.zeros((), dtype=torch.int64, device=positions.device) for _ in range(3))
    for group in plan.groups:
        q_pos, k_pos = group.q_positions(), group.k_positions()
        for first, last in group.slices():
            lists = group.lists(first, last)
            full += lists.full_count.sum()
            partial += lists.partial_count.sum()
            for r, row in enumerate(group.heads):
                here = q_pos[r, first * TILE : last * TILE].long()
                found = torch.isin(here, positions) & (here != PAD)
                place = found.nonzero()[:, 0]
                if not len(place):
                    continue
                number = torch.searchsorted(positions, here[place])
                for i, head in enumerate(row):
                    if head >= 0:  # a later group's rows replace an earlier one's, as in the engines
                        mask, wrong = _visible(group, lists, r, i, place, here[place], k_pos[r])
                        masks[head, number] = mask
                        future += wrong
    totals = torch.stack([full, partial, future]).tolist()
    return Seen(masks=masks, tiles=totals[0] + totals[1], partial=totals[1], future=totals[2])


def _visible(
    group: HeadGroup, lists: TileLists, r: int, i: int, place: torch.Tensor, position: torch.Tensor, k_pos: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [n, Nk] of one head, and how many keys of full tiles come after the query (or don't exist)."""
    member, tile = r * len(group.heads[0]) + i, place // TILE
    slots = []
    for count, index in ((lists.full_count, lists.full_index), (lists.partial_count, lists.partial_index)):
        listed = index[member, tile].long()  # [n, W]
        meant = torch.arange(listed.shape[1], device=listed.device) < count[member, tile][:, None]
        on = torch.zeros(len(place), group.key_tiles + 1, dtype=torch.bool, device=listed.device)
        on.scatter_(1, torch.where(meant, listed, group.key_tiles), True)
        slots.append(on[:, :-1].repeat_interleave(TILE, 1))
    past = k_pos <= position[:, None]  # PAD is later than every query
    wrong = (slots[0] & ~past).sum()
    seen = (slots[0] | slots[1]) & past
    out = torch.zeros(len(place), group.keys + 1, dtype=torch.bool, device=seen.device)
    out.scatter_(1, torch.where(k_pos == PAD, group.keys, k_pos).long().expand(len(place), -1), seen)
    return out[:, :-1], wrong


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """By head: recall [H] (mean share of the dense softmax's mass that is attended), error [H] and torch's own [H].

    Errors are relative, in the norm over the sampled rows, against fp32 softmax over the attended set. floor: an eighth
    of the dtype's resolution, so that rows which torch happens to get exactly right don't count as a miss of ours.
    """

    recall: torch.Tensor
    error: torch.Tensor
    torch_error: torch.Tensor
    floor: float

    @property
    def ratio(self) -> float:
        """The worst head's error over what SDPA loses there; WRONG for NaN."""
        worst = (self.error / self.torch_error.clamp(min=self.floor)).nan_to_num(nan=WRONG).clamp(max=WRONG).max()
        return float(worst)


def exactness(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, positions: torch.Tensor, masks: torch.Tensor,
    scale: float,
) -> Exactness:  # fmt: skip
    """Compare sampled rows of `out` with a plain softmax in fp32 over exactly `masks`.

    Args:
        q, out: [Nq, H, D], the chunk's; k, v: [Nk, Hkv, D].
        positions: int64 [n]; masks: bool [H, n, Nk].
    """
    group, place = q.shape[1] // k.shape[1], positions - (len(k) - len(q))
    after = torch.arange(len(k), device=q.device) > positions[:, None]
    recall, error, torch_error = [], [], []
    for head in range(q.shape[1]):
        kv, mask = head // group, masks[head]
        keys, values, query = k[:, kv], v[:, kv], q[place, head]
        logits = (query.float() * scale) @ keys.float().T
        dense = logits.masked_fill(after, -torch.inf).softmax(1)
        recall.append(dense.mul_(mask).sum(1).mean())
        want = logits.masked_fill_(~mask, -torch.inf).softmax(1).nan_to_num_(0.0) @ values.float()
        plain = torch.nn.functional.scaled_dot_product_attention(
            query[None, None], keys[None, None], values[None, None], attn_mask=mask[None, None], scale=scale
        )[0, 0]
        size = want.norm().clamp(min=1e-12)
        error.append((out[place, head].float() - want).norm() / size)
        torch_error.append((plain.float().nan_to_num(0.0) - want).norm() / size)
    floor = max(torch.finfo(q.dtype).eps / 8, 1e-6)
    return Exactness(
        recall=torch.stack(recall), error=torch.stack(error), torch_error=torch.stack(torch_error), floor=floor
    )  # fmt: skip
