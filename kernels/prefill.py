"""Sparse prefill of one chunk of one request: estimate, select, plan, attend.

Legend: Nq queries of the chunk, Nk = prefix + Nq keys, H query heads, Hkv KV heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.estimate.reference import last_query_attention
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns.base import Chunk, HeadPattern
from mm_sglang.kernels.plan import Plan, head_group


def make_plan(
    q: torch.Tensor, k: torch.Tensor, *, layout: TokenLayout, patterns: Sequence[HeadPattern], scale: float
) -> Plan:
    """Choose what this chunk's queries attend, from the prompt itself.

    Args:
        q: [Nq, H, D], positions [Nk - Nq, Nk) in order.
        k: [Nk, Hkv, D], every key so far.
        layout: of exactly the positions [0, Nk).
        patterns: one recipe a query head.
        scale: of the logits.

    Raises:
        ValueError: shapes, devices or lengths that don't fit each other.
    """
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: needs [Nq, H, D] and [Nk, Hkv, D]")
    queries, heads, keys, kv_heads = len(q), q.shape[1], len(k), k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, k has {kv_heads}: needs a multiple")
    if not 0 < queries <= keys:
        raise ValueError(f"{queries} queries, {keys} keys: needs at least one query and a key for each")
    if layout.length != keys:
        raise ValueError(f"layout of {layout.length} positions: needs {keys}, one a key")
    if len(patterns) != heads:
        raise ValueError(f"{len(patterns)} patterns: needs {heads}, one a query head")
    if len({q.device, k.device, layout.coordinates.device}) > 1:
        raise ValueError(f"q on {q.device}, k on {k.device}, layout on {layout.coordinates.device}: needs one device")

    groups = []
    for pattern in dict.fromkeys(patterns):  # heads of equal recipes form a group, in order of first use
        members = torch.tensor([h for h, p in enumerate(patterns) if p == pattern], device=q.device)
        kv_head, row = torch.unique(members // (heads // kv_heads), return_inverse=True)
        probe = None
        if pattern.probe:
            probe = last_query_attention(q[-pattern.probe :, members], k[:, kv_head], row, scale)
        kept = pattern.select(Chunk(layout=layout, prefix=keys - queries, queries=queries, row=row), probe)
        groups.append(head_group(pattern, members, row, kv_head, kept, keys - queries))
    return Plan(prefix=keys - queries, queries=queries, heads=heads, groups=tuple(groups))


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    patterns: Sequence[HeadPattern],
    scale: float,
    engine: Engine,
) -> tuple[torch.Tensor, torch.Tensor, Plan]:
    """Plan and attend one chunk.

    Args:
        v: [Nk, Hkv, D]; the others as for `make_plan`.
        engine: from `kernels.engines.engine`.

    Returns:
        out [Nq, H, D] in q's dtype, lse [Nq, H] fp32 (natural logarithm), and the plan that was run.
    """
    if v.shape != k.shape or v.device != k.device:
        raise ValueError(
            f"v {tuple(v.shape)} on {v.device}: needs k's shape and device, {tuple(k.shape)} on {k.device}"
        )
    plan = make_plan(q, k, layout=layout, patterns=patterns, scale=scale)
    out, lse = engine.attend(q, k, v, plan, scale)
    return out, lse, plan
