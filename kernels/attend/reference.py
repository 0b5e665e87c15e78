"""The reference engine: runs a Plan in torch, fp32 inside, on any device.

Legend: Nq queries, Nk keys, H query heads, Hkv KV heads, D head dimension, T tile size, W tiles listed.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.permute.reference import PAD, TILE
from mm_sglang.kernels.plan import Plan


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over exactly the keys the plan lists, per query and head.

    Args:
        q: [Nq, H, D] the chunk's queries in prompt order.
        k, v: [Nk, Hkv, D], positions [0, Nk).
        plan: for these shapes.
        scale: of the logits.

    Returns:
        out [Nq, H, D] in q's dtype and lse [Nq, H] fp32, natural logarithm. A query with no visible key gets out = 0
        and lse = -inf.
    """
    out = torch.full_like(q, float("nan"), dtype=torch.float32)
    lse = torch.full(q.shape[:2], float("nan"), device=q.device)
    for group in plan.groups:
        for index, (head, row) in enumerate(zip(group.heads.tolist(), group.row.tolist(), strict=True)):
            kv = int(group.kv_head[row])
            k_pos = group.k_order[row]
            at = torch.where(k_pos == PAD, 0, k_pos).long()
            keys = k[:, kv].float()[at].view(-1, TILE, k.shape[2])  # [Mk, T, D] permuted
            values = v[:, kv].float()[at].view(-1, TILE, v.shape[2])
            k_pos = k_pos.view(-1, TILE)
            for m, q_pos in enumerate(group.q_order[row].view(-1, TILE)):
                q_pos = q_pos[q_pos != PAD]
                rows = q_pos.long() - plan.prefix
                full = group.full_index[index, m, : group.full_count[index, m]].long()
                partial = group.partial_index[index, m, : group.partial_count[index, m]].long()
                tiles = torch.cat([full, partial])
                logits = (q[rows, head].float() * scale) @ keys[tiles].flatten(0, 1).T  # [T, W * T]
                hidden = k_pos[partial].flatten()[None, :] > q_pos[:, None]  # only partial tiles test positions
                logits[:, len(full) * TILE :].masked_fill_(hidden, float("-inf"))
                top = logits.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).min) if len(tiles) else 0.0
                weight = (logits - top).exp_()
                total = weight.sum(1, keepdim=True)
                out[rows, head] = (weight @ values[tiles].flatten(0, 1)) / total.clamp(min=1e-38)
                lse[rows, head] = (total.log() + top)[:, 0]
    return out.to(q.dtype), lse
