"""Pooled residual: tiles that are not computed count as one mean key each (FlashPrefill V2, arXiv 2608.19758).

A tile that a query tile does not list, but whose keys all of its rows may see, is attended through the mean of its
keys and values with weight = number of keys: one logit q . mean(k) * scale + log(number), merged by log-sum-exp.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.estimate.blocks_reference import pool
from mm_sglang.kernels.merge.reference import merge
from mm_sglang.kernels.plan import PAD, TILE, HeadGroup


def residual(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor | None,
    group: HeadGroup,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Adds the group's residual to out and lse, in place. Arguments as for attend.reference.attend."""
    g, kv = len(group.heads[0]), tuple((head,) for head in group.kv_head)
    k_mean, v_mean = (pool(x, group.k_order, slots, kv, 1, False, 0, group.keys).float() for x in (k, v))
    k_pos = group.k_positions().view(len(kv), -1, TILE)
    number = (k_pos != PAD).sum(2)
    last = torch.where(k_pos == PAD, -1, k_pos).amax(2)  # [R, Mk]
    lists = group.lists()
    for r, row in enumerate(group.heads):
        q_pos = group.q_positions()[r].view(-1, TILE)
        for i, head in enumerate(row):
            for m, own in enumerate(q_pos if head >= 0 else ()):
                own = own[own != PAD]
                if len(own) == 0:
                    continue
                missing = (number[r] > 0) & (last[r] <= own.min())
                index = r * g + i, m
                missing[lists.full_index[index][: lists.full_count[index]].long()] = False
                missing[lists.partial_index[index][: lists.partial_count[index]].long()] = False
                at = own.long() - group.prefix
                logits = q[at, head].float() @ k_mean[r, missing].T * scale + number[r, missing].log()
                other_lse = logits.logsumexp(1)
                other = (logits - other_lse[:, None]).exp().nan_to_num(0.0) @ v_mean[r, missing]
                mine, mine_lse = out[at, head][:, None], lse[head, at][None]
                merge(mine, mine_lse, other[:, None], other_lse[None])
                out[at, head], lse[head, at] = mine[:, 0], mine_lse[0]
