"""Which key tiles a query tile keeps by their block scores; see plan.Blocks."""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import Blocks


def scores(blocks: Blocks, first: int, last: int) -> torch.Tensor:
    """fp32 [G, M, Mks] of query tiles [first, last)."""
    query = blocks.q[:, first:last].float().chunk(blocks.parts, 2)
    keys = blocks.k.float().repeat_interleave(len(blocks.q) // len(blocks.k), 0).chunk(blocks.parts, 2)
    weight = torch.zeros(*blocks.k.shape[:2], blocks.parts, device=blocks.k.device)
    weight = weight if blocks.weight is None else blocks.weight
    weights = weight.repeat_interleave(len(blocks.q) // len(blocks.k), 0)[:, None].unbind(3)  # [G, 1, Mks] each
    score: torch.Tensor | None = None
    for q in query:
        for k, w in zip(keys, weights, strict=True):
            product = torch.einsum("gme,gne->gmn", q, k) * blocks.scale + w
            score = product if score is None else torch.logaddexp(score, product)
    assert score is not None
    return score


def best_blocks(blocks: Blocks, first: int, last: int, reached: torch.Tensor) -> torch.Tensor:
    """Bool [G, M, Mks] for query tiles [first, last); reached: int32 [R, M] visible tiles, [0, reached) of the segment.

    Forced tiles always; then the best scores (of equal ones the first) until `keep` in all, or until the softmax mass
    of the kept reaches `coverage`.
    """
    score, tiles, g = scores(blocks, first, last), blocks.k.shape[1], len(blocks.q) // len(blocks.k)
    seen = reached.repeat_interleave(g, 0)[..., None]
    number = torch.arange(tiles, device=score.device)
    visible = number < seen
    forced = visible & ((number < blocks.sink) | (number >= seen - blocks.local))
    mass = score.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0.0)
    key = torch.where(forced, float("inf"), torch.where(visible, score, float("-inf")))
    ranked, index = key.sort(dim=-1, descending=True, stable=True)
    held = mass.gather(2, index).double()
    taken = number < torch.maximum(forced.sum(-1, keepdim=True), torch.tensor(blocks.keep))
    if blocks.coverage is not None:
        taken &= torch.cumsum(held, 2) - held < blocks.coverage
    taken = (taken | (ranked == float("inf"))) & (ranked != float("-inf"))
    return torch.zeros_like(visible).scatter_(2, index, taken)
