"""Two attention results over disjoint keys into one, by log-sum-exp (FlashInfer's cascade `merge_state`)."""

from __future__ import annotations

import torch


def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> None:
    """In place: out, lse become the result over the union of the keys.

    Args:
        out, other: [N, H, D]; lse, other_lse: fp32 [H, N], natural logarithm, -inf for a row that saw no key.
    """
    both = torch.logaddexp(lse, other_lse)
    first, second = ((x - both).exp().nan_to_num(0.0).T[..., None] for x in (lse, other_lse))
    out.copy_(out.float() * first + other.float() * second)
    lse.copy_(both)
