"""Which key tiles a query tile keeps by their block scores; see plan.Blocks."""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import Blocks


def scores(blocks: Blocks, first: int, last: int, visible: torch.Tensor) -> torch.Tensor:
    """fp32 [G, M, Mks] of query tiles [first, last); -inf where not `visible` (bool [G, M, Mks])."""
    query = blocks.q[:, first:last].float().chunk(blocks.parts, 2)
    keys = blocks.k.float().repeat_interleave(len(blocks.q) // len(blocks.k), 0).chunk(blocks.parts, 2)
    weight = blocks.weight
    if weight is None:
        weight = torch.zeros(*blocks.k.shape[:2], blocks.parts, device=blocks.k.device)
    weights = weight.repeat_interleave(len(blocks.q) // len(blocks.k), 0)[:, None].unbind(3)  # [G, 1, Mks] each
    total = torch.full(visible.shape, -torch.inf, device=blocks.q.device)
    for q in query:
        own = torch.full_like(total, -torch.inf)
        for k, w in zip(keys, weights, strict=True):
            own = torch.logaddexp(own, torch.einsum("gme,gne->gmn", q, k) * blocks.scale + w)
        own = own.masked_fill(~visible, -torch.inf)
        if blocks.parts > 1:  # one part's needs no softmax to be compared
            own = own - own.logsumexp(2, keepdim=True).nan_to_num(neginf=0.0)
        total = torch.logaddexp(total, own)
    return total


def best_blocks(blocks: Blocks, first: int, last: int, reached: torch.Tensor) -> torch.Tensor:
    """Bool [G, M, Mks] for query tiles [first, last); reached: int32 [R, M] visible tiles, [0, reached) of the segment.

    Forced tiles always; then the best scores (of equal ones the first) until `keep` in all, or until the softmax mass
    of the kept reaches `coverage`; of less than `least` none.
    """
    seen = reached.repeat_interleave(len(blocks.q) // len(blocks.k), 0)[..., None]
    number = torch.arange(blocks.k.shape[1], device=reached.device)
    visible = number < seen
    score = scores(blocks, first, last, visible)
    forced = visible & ((number < blocks.sink) | (number >= seen - blocks.local))
    mass = score.softmax(-1).nan_to_num(0.0)
    key = torch.where(forced, float("inf"), torch.where(mass >= blocks.least, score, float("-inf")))
    ranked, index = key.sort(dim=-1, descending=True, stable=True)
    held = mass.gather(2, index).double()
    taken = number < torch.maximum(forced.sum(-1, keepdim=True), torch.tensor(blocks.keep))
    if blocks.coverage is not None:
        taken &= torch.cumsum(held, 2) - held < blocks.coverage
    taken = (taken | (ranked == float("inf"))) & (ranked != float("-inf"))
    return torch.zeros_like(visible).scatter_(2, index, taken)
