"""What the last queries of a chunk look at: the sample from which the patterns are found (MInference; MMInference 3.2).

Legend: L sampled queries, G query heads, R KV heads of the group, Nk keys, D head dimension.
"""

from __future__ import annotations

import torch


def last_query_attention(q: torch.Tensor, k: torch.Tensor, row: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention weights of the last queries over all keys, fp32 [G, L, Nk]; query l is key position Nk - L + l.

    Args:
        q: [L, G, D] the chunk's last L queries.
        k: [Nk, R, D] every key so far.
        row: int64 [G] which of the R each head reads.
        scale: of the logits, 1/sqrt(D) as a rule.
    """
    logits = torch.einsum("lgd,ngd->gln", q.float(), k.float()[:, row]) * scale
    at = torch.arange(len(k), device=q.device)
    future = at[None, :] > (len(k) - len(q) + torch.arange(len(q), device=q.device))[:, None]
    return logits.masked_fill(future, float("-inf")).softmax(-1)


def column_mass(probe: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Mean weight a sampled query gives to each key, heads of one KV head averaged, fp32 [R, Nk].

    Args:
        probe: [G, L, Nk] from `last_query_attention`.
        row: int64 [G].
    """
    rows = int(row.max()) + 1
    mass = torch.zeros(rows, probe.shape[2], device=probe.device).index_add_(0, row, probe.mean(1))
    return mass / torch.bincount(row, minlength=rows)[:, None]


def diagonal_mass(probe: torch.Tensor) -> torch.Tensor:
    """Weight on each distance query - key, summed over the sampled queries, fp32 [G, Nk].

    Args:
        probe: [G, L, Nk] from `last_query_attention`.
    """
    heads, sample, keys = probe.shape
    out = torch.zeros(heads, keys, device=probe.device)
    for index in range(sample):
        position = keys - sample + index  # this query sees distances 0..position
        out[:, : position + 1] += probe[:, index, : position + 1].flip(-1)
    return out
