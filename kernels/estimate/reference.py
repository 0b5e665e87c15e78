"""What a few queries look at, from which columns, diagonals and lines are found (MInference; MMInference 3.2).

Legend: L sampled queries, R KV heads and g query heads of each (G = R * g), F sampled keys, Nk keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mm_sglang.kernels.plan import BUCKET
from mm_sglang.kernels.share import Team, gathered, part_of

PIECE = 256  # keys that are computed at once, on whichever rank: the same shapes give the same bits
# Weights that several summands share are added as whole numbers of 2^-40, so that the sum does not depend on the order.
FIXED_POINT = 2.0**40


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
    team: Team | None,
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
        team: ranks that ask for the same and compute parts of the keys each; all get the same bits, those of one alone.

    Returns:
        columns fp32 [R, F]: mean weight on each sampled key over the queries and heads of each KV head;
        buckets fp32 [G, ceil(Nk / BUCKET)]: weight on each bucket of distances, summed over the queries.
    """
    device, g = q.device, len(heads[0])
    flat = torch.tensor(heads, device=device).flatten()  # [G]
    at = torch.arange(keys, device=device) if k_pos is None else k_pos.long()
    source = torch.tensor(kv_head, device=device).repeat_interleave(g)  # [G] its KV head
    asked = q[rows.long()][:, flat.clamp(min=0)].transpose(0, 1).float()  # [G, L, D]
    first, number = part_of(team, -(-len(at) // PIECE))

    def pieces() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Masked logits [G, L, PIECE] or fewer, and distances [L, PIECE]."""
        for piece in range(first, min(first + number, -(-len(at) // PIECE))):
            own = at[piece * PIECE : (piece + 1) * PIECE]
            distance = prefix + rows.long()[:, None] - own
            hidden = ((distance < 0) | (rows < 0)[:, None]) | (flat < 0)[:, None, None]
            of = k[own if slots is None else slots[own].long()][:, source].float()  # [PIECE, G, D]
            logits = asked @ of.permute(1, 2, 0) * scale
            yield logits.masked_fill(hidden, float("-inf")), distance.clamp(min=0)

    stats = torch.tensor([-1e30, 0.0], device=device).view(2, 1, 1).repeat(number, 1, len(flat), len(rows))
    for n, (logits, _) in enumerate(pieces()):
        stats[n, 0] = logits.amax(2).clamp(min=-1e30)
        stats[n, 1] = (logits - stats[n, 0, ..., None]).exp().sum(2)
    tops, sums = gathered(team, stats).unbind(1)
    total = (sums * (tops - tops.amax(0)).exp()).sum(0)
    lse = torch.where(total > 0, tops.amax(0) + total.log(), float("inf"))  # [G, L]; inf: it sees nothing

    columns = torch.zeros(number, len(kv_head), PIECE, device=device)
    buckets = torch.zeros(len(flat), -(-keys // BUCKET), dtype=torch.int64, device=device)
    for n, (logits, distance) in enumerate(pieces()):
        weight = (logits - lse[..., None]).exp()
        columns[n, :, : weight.shape[2]] = weight.view(len(kv_head), -1, weight.shape[2]).sum(1)
        buckets.index_add_(1, (distance // BUCKET).flatten(), (weight * FIXED_POINT).long().flatten(1))
    real = (flat >= 0).view(-1, g).sum(1, keepdim=True).clamp(min=1) * max(1, len(rows))
    mean = gathered(team, columns).transpose(0, 1).flatten(1)[:, : len(at)] / real
    return mean, gathered(team, buckets[None]).sum(0).float() / FIXED_POINT


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
