"""Block scores: one number for each tile of queries and keys, from pooled rows (MInference, FlexPrefill, XAttention).

A tile's rows stand in parts of queries and parts of keys, every pair of which has a product. What comes of them, the
mean softmax of the parts of queries over the sums of their tiles (plan.Blocks), is what the tile's own products would
give if all members of a part were alike.

- One part each, the mean: mean query . mean key.
- By clusters: queries in plan.PARTS runs of neighbouring rows, keys in as many groups of like ones. Runs would do for
  keys that are like their neighbours; what is looked up stands alone.
- By antidiagonals (XAttention, arXiv 2503.16428): parts of 16 rows, kept whole, those of keys in falling order. The
  product of two, over 16, is the mean of an antidiagonal of their 16 x 16.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import EMPTY, PAD, PARTS, TILE, in_order


def pool(
    x: torch.Tensor,
    order: torch.Tensor | None,
    slots: torch.Tensor | None,
    heads: tuple[tuple[int, ...], ...],
    parts: int,
    reverse: bool,
    base: int,
    count: int,
) -> torch.Tensor:
    """Means of each tile's `parts` runs of neighbouring rows, [G, M, parts * D] in x's dtype, summed in fp32.

    A run without a row has the tile's mean, a tile without one zeros.

    Args:
        x: [P, H, D], any strides, D contiguous.
        order: int32 [R, M * TILE] positions (PAD: none), or None: positions [base, base + count) in order.
        slots: int32 row of x that holds each position; None: position - base.
        heads: [R][g]; -1 gives zeros.
        parts: a divisor of TILE; TILE gives the rows themselves.
        reverse: runs in falling order.
    """
    if order is None:
        order = in_order(base, count, x.device).expand(len(heads), -1)
    out = []
    for r, row in enumerate(heads):
        real = order[r] != PAD
        at = torch.where(real, order[r], base).long()
        at = at - base if slots is None else slots[at].long()
        number = real.view(-1, parts, TILE // parts).sum(2)[..., None]
        for head in row:
            rows = torch.where((real & (head >= 0))[:, None], x[at, max(head, 0)].float(), 0.0)
            total = rows.view(-1, parts, TILE // parts, x.shape[2]).sum(2)
            whole = (total.sum(1) / number.sum(1).clamp(min=1))[:, None]
            mean = torch.where(number > 0, total / number.clamp(min=1), whole)
            out.append((mean.flip(1) if reverse else mean).flatten(1))
    return torch.stack(out).to(x.dtype)


def clusters(
    x: torch.Tensor,
    order: torch.Tensor | None,
    slots: torch.Tensor | None,
    heads: tuple[int, ...],
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each tile's rows in PARTS groups: means [R, M, PARTS * D] in x's dtype, logs of their numbers fp32 [R, M, PARTS].

    The first centre is the tile's mean, each further one the row furthest from all before it; a row joins the nearest
    (of equals the first). What differs most from the rest so gets a group of its own (Gonzalez, 1985), and moving the
    centres after that (Lloyd) gained nothing. A group without rows has EMPTY for its logarithm.

    Args:
        x, order, slots: as for `pool`; positions [0, count) with order None.
        heads: [R] heads of x, one for each order.
    """
    if order is None:
        order = in_order(0, count, x.device).expand(len(heads), -1)
    means, numbers = [], []
    for head, row in zip(heads, order, strict=True):
        real = row != PAD
        at = torch.where(real, row, 0).long()
        at = at if slots is None else slots[at].long()
        real = real.view(-1, TILE)
        rows = torch.where(real[..., None], x[at, head].float().view(*real.shape, -1), 0.0)
        centre = rows.sum(1) / real.sum(1).clamp(min=1)[:, None]
        nearest = torch.full(real.shape, torch.inf, device=x.device)
        group = torch.zeros(real.shape, dtype=torch.long, device=x.device)
        for part in range(PARTS):
            if part:
                far = torch.where(real, nearest, -1.0).argmax(1)
                centre = rows[torch.arange(len(rows), device=x.device), far]
            distance = (rows - centre[:, None]).square().sum(2)
            group = torch.where(distance < nearest, part, group)
            nearest = torch.minimum(nearest, distance)
        member = (torch.nn.functional.one_hot(group, PARTS) * real[..., None]).float()  # [M, TILE, PARTS]
        number = member.sum(1)
        means.append((member.transpose(1, 2) @ rows / number.clamp(min=1)[..., None]).flatten(1))
        numbers.append(torch.where(number > 0, number.clamp(min=1).log(), EMPTY))
    return torch.stack(means).to(x.dtype), torch.stack(numbers)
