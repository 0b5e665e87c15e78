"""What a few queries look at, from which columns, diagonals and lines are found (MInference; MMInference 3.2).

Legend: L sampled queries, R KV heads and g query heads of each (G = R * g), F sampled keys, Nk keys, D head dimension.
"""

from __future__ import annotations

import torch

from mm_sglang.kernels.plan import BUCKET


def sampled_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor | None,
    heads: tuple[tuple[int, ...], ...],
    kv_head: tuple[int, ...],
    rows: torch.Tensor,
    prefix: int,
    keys: int,
    k_pos: torch.Tensor | None,
    scale: float,
    last_row: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of the sampled queries over the sampled keys at or before them, summed two ways.

    Args:
        q: [Nq, H, D], row i is position prefix + i.
        k: [P, Hkv, D]; a key's row is its position, or slots[position] (int32) in a paged pool.
        heads, kv_head: [R][g] query heads (-1: filler) and [R] KV heads, as in HeadGroup.
        rows: int32 [L] rows of q, ascending; negative ones are left out.
        keys: Nk; k_pos: int32 [F] ascending positions, or None for all Nk.
        scale: of the logits.
        last_row: the last of `rows` if they are consecutive, which the host then knows; else None. Not needed here.

    Returns:
        columns fp32 [R, F]: mean weight on each sampled key over the queries and heads of each KV head;
        buckets fp32 [G, ceil(Nk / BUCKET)]: weight on each bucket of distances, summed over the queries.
    """
    device, g = q.device, len(heads[0])
    at = torch.arange(keys, device=device) if k_pos is None else k_pos.long()
    source = k[at if slots is None else slots[at].long()]
    distance = prefix + rows.long()[:, None] - at  # [L, F]
    hidden = (distance < 0) | (rows < 0)[:, None]
    columns = torch.zeros(len(kv_head), len(at), device=device)
    buckets = torch.zeros(len(kv_head) * g, -(-keys // BUCKET), device=device)
    for r, (row, kv) in enumerate(zip(heads, kv_head, strict=True)):
        for i, head in enumerate(row):
            if head < 0:
                continue
            logits = (q[rows.long(), head].float() @ source[:, kv].float().T) * scale
            weight = logits.masked_fill(hidden, float("-inf")).softmax(1).nan_to_num(0.0)
            columns[r] += weight.sum(0)
            buckets[r * g + i].index_add_(0, (distance.clamp(min=0) // BUCKET).flatten(), weight.flatten())
        columns[r] /= max(1, sum(h >= 0 for h in row)) * max(1, len(rows))
    return columns, buckets


def row_lse(
    q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None, rows: torch.Tensor, prefix: int, scale: float
) -> torch.Tensor:
    """fp32 [H, L]: log-sum-exp of dense causal attention for a few queries; with a sparse prefill's own, their recall.

    Args:
        q: [Nq, H, D], row i is position prefix + i; k, slots: as above, of all prefix + Nq keys.
        rows: int32 [L] rows of q.
    """
    at = torch.arange(prefix + len(q), device=q.device)
    source = k[at if slots is None else slots.long()].repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("lhd,nhd->hln", q[rows.long()].float(), source.float()) * scale
    return logits.masked_fill(at > (prefix + rows.long())[:, None], float("-inf")).logsumexp(2)
