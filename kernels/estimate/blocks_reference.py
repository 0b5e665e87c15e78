"""Block scores: one number for each tile of queries and keys, from pooled rows (MInference, FlexPrefill, XAttention).

The score is a plain dot product of what `pool` returns for queries and for keys, over the number of residues. With one
residue that is mean query . mean key. With s residues, laid out forwards for queries and backwards for keys, it is the
mean of the tile's antidiagonal elements (i + j) % s == s - 1: XAttention's score (arXiv 2503.16428), but with the
softmax taken over tiles afterwards instead of over groups of s keys before summing, which keeps it a small product.
With runs of neighbouring rows (plan.PARTS a tile) every pair of runs has a product, and the score is their log-sum-exp.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import PAD, TILE


def pool(
    x: torch.Tensor,
    order: torch.Tensor | None,
    slots: torch.Tensor | None,
    heads: tuple[tuple[int, ...], ...],
    stride: int,
    reverse: bool,
    base: int,
    count: int,
    runs: bool = False,
) -> torch.Tensor:
    """Means of every stride-th row of each tile, [G, M, stride * D] in x's dtype, summed in fp32; 0 where no row is.

    Args:
        x: [P, H, D], any strides, D contiguous.
        order: int32 [R, M * TILE] positions (PAD: none), or None: positions [base, base + count) in order.
        slots: int32 row of x that holds each position; None: position - base.
        heads: [R][g]; -1 gives zeros.
        stride: residues a tile is split into, a divisor of TILE; residue r is slots r, r + stride, ... of the tile.
        reverse: residues in falling order, as keys need them.
        runs: means of `stride` runs of TILE / stride neighbouring rows instead; one without a row gets the tile's mean.
    """
    if order is None:
        at = torch.arange(-(-count // TILE) * TILE, device=x.device)
        order = torch.where(at < count, at + base, PAD).int().expand(len(heads), -1)
    out = []
    for r, row in enumerate(heads):
        real = order[r] != PAD
        at = torch.where(real, order[r], base).long()
        at = at - base if slots is None else slots[at].long()
        shape, across = ((-1, stride, TILE // stride), 2) if runs else ((-1, TILE // stride, stride), 1)
        number = real.view(shape).sum(across)[..., None]
        for head in row:
            rows = torch.where((real & (head >= 0))[:, None], x[at, max(head, 0)].float(), 0.0)
            total = rows.view(*shape, x.shape[2]).sum(across)
            mean = total / number.clamp(min=1)
            if runs:
                mean = torch.where(number > 0, mean, (total.sum(1) / number.sum(1).clamp(min=1))[:, None])
            out.append((mean.flip(1) if reverse else mean).flatten(1))
    return torch.stack(out).to(x.dtype)
