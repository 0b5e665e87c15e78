"""The reference engine: runs a group's tiles in torch, fp32 inside, on any device."""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import PAD, TILE, HeadGroup


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor | None,
    group: HeadGroup,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Softmax over exactly the keys that the group's tiles hold, per query and head, written into out and lse.

    Args:
        q: [Nq, H, D] the chunk's queries in prompt order.
        k, v: [P, Hkv, D]; a key's row is its position, or slots[position] (int32) in a paged pool.
        scale: of the logits.
        out: [Nq, H, D]; lse: fp32 [H, Nq], natural logarithm. A query with no visible key gets 0 and -inf.
    """
    g = len(group.heads[0])
    q_pos, k_pos = group.q_positions(), group.k_positions()
    for first, last in group.slices():
        lists = group.lists(first, last)
        for r, kv in enumerate(group.kv_head):
            at = torch.where(k_pos[r] == PAD, 0, k_pos[r]).long()
            at = at if slots is None else slots[at].long()
            keys = k[at, kv].float().view(-1, TILE, k.shape[2])
            values = v[at, kv].float().view(-1, TILE, v.shape[2])
            position = k_pos[r].view(-1, TILE)
            for i, head in enumerate(group.heads[r]):
                for m in range(last - first) if head >= 0 else ():
                    rows = q_pos[r, (first + m) * TILE : (first + m + 1) * TILE]
                    rows = rows[rows != PAD]
                    index = r * g + i, m
                    full = lists.full_index[index][: lists.full_count[index]].long()
                    partial = lists.partial_index[index][: lists.partial_count[index]].long()
                    tiles = torch.cat([full, partial])
                    place = rows.long() - group.prefix
                    if len(tiles) == 0:
                        out[place, head], lse[head, place] = 0.0, float("-inf")
                        continue
                    logits = (q[place, head].float() * scale) @ keys[tiles].flatten(0, 1).T
                    hidden = position[partial].flatten()[None] > rows[:, None]  # only partial tiles test positions
                    logits[:, len(full) * TILE :].masked_fill_(hidden, float("-inf"))
                    top = logits.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
                    weight = (logits - top).exp_()
                    total = weight.sum(1, keepdim=True)
                    out[place, head] = ((weight @ values[tiles].flatten(0, 1)) / total.clamp(min=1e-38)).to(out.dtype)
                    lse[head, place] = (total.log() + top)[:, 0]


def dense_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 [L, H, D]: dense causal attention of a few queries of a whole prompt.

    Args:
        q: [N, H, D]; k, v: [N, Hkv, D]; at: int64 [L] positions.
    """
    share, out = q.shape[1] // k.shape[1], []
    after = torch.arange(len(k), device=q.device) > at[:, None]
    for head in range(q.shape[1]):
        logits = q[at, head].float() @ k[:, head // share].float().T * scale
        out.append(logits.masked_fill_(after, -torch.inf).softmax(1) @ v[:, head // share].float())
    return torch.stack(out, 1)
