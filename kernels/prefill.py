"""Sparse prefill of one chunk of one request: estimate, select, permute, plan, attend.

Legend: Nq queries of the chunk, Nk = prefix + Nq keys, H query heads, Hkv KV heads, D head dimension, P rows of a pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.grouping import groups_of
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import Ops
from mm_sglang.kernels.patterns.base import HeadPattern
from mm_sglang.kernels.plan import HeadGroup, Plan


def make_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    layout: TokenLayout,
    patterns: Sequence[HeadPattern],
    scale: float,
    ops: Ops,
    slots: torch.Tensor | None = None,
) -> Plan:
    """Choose what this chunk's queries attend, from the prompt itself. Arguments and errors: see `sparse_prefill`."""
    _check(q, k, k, layout, patterns, slots)
    return Plan(
        prefix=layout.length - len(q), queries=len(q), heads=q.shape[1],
        groups=tuple(_groups(q, k, slots, layout, patterns, scale, ops)),
    )  # fmt: skip


def _groups(
    q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None, layout: TokenLayout, patterns: Sequence[HeadPattern],
    scale: float, ops: Ops,
) -> Iterator[HeadGroup]:  # fmt: skip
    for pattern in dict.fromkeys(patterns):  # heads of equal recipes form groups, in order of first use
        yield from groups_of(q, k, slots, layout, patterns, pattern, scale, ops)


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: TokenLayout,
    patterns: Sequence[HeadPattern],
    scale: float,
    engine: Engine,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Plan]:
    """Plan and attend one chunk; nothing in it waits for the device.

    Args:
        q: [Nq, H, D], positions [Nk - Nq, Nk) in order.
        k, v: [P, Hkv, D]: every key so far, in order (P = Nk), or a paged pool with `slots`.
        layout: of exactly the positions [0, Nk), on q's device.
        patterns: one recipe a query head.
        scale: of the logits.
        engine: from `kernels.engines.engine`.
        slots: int32 [Nk] row of k and v that holds each position (page tables of any page size, written out), or None.

    Returns:
        out [Nq, H, D] in q's dtype, lse [Nq, H] fp32 (natural logarithm), and the plan that was run.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that don't fit each other or the engine; before any launch.
    """
    _check(q, k, v, layout, patterns, slots)
    engine.check(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], len(q), device=q.device)
    groups = []
    for group in _groups(q, k, slots, layout, patterns, scale, engine.ops()):
        engine.attend(q, k, v, slots, group, scale, out, lse)  # at once: the device works while the next is planned
        if group.pattern.residual and not group.everything:
            engine.ops().residual(q, k, v, slots, group, scale, out, lse)
        groups.append(group)
    plan = Plan(prefix=layout.length - len(q), queries=len(q), heads=q.shape[1], groups=tuple(groups))
    return out, lse.T, plan


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, patterns: Sequence[HeadPattern],
    slots: torch.Tensor | None,
) -> None:  # fmt: skip
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}: needs [Nq, H, D] and [Nk, Hkv, D]")
    if v.shape != k.shape:
        raise ValueError(f"v {tuple(v.shape)}: needs k's shape {tuple(k.shape)}")
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: needs one dtype")
    queries, heads, kv_heads = len(q), q.shape[1], k.shape[1]
    keys = len(k) if slots is None else len(slots)
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, k has {kv_heads}: needs a multiple")
    if not 0 < queries <= keys:
        raise ValueError(f"{queries} queries, {keys} keys: needs at least one query and a key for each")
    if slots is not None and (slots.dtype != torch.int32 or slots.ndim != 1 or not slots.is_contiguous()):
        raise ValueError(f"slots {slots.dtype} {tuple(slots.shape)}: needs contiguous int32 [Nk]")
    if layout.length != keys:
        raise ValueError(f"layout of {layout.length} positions: needs {keys}, one a key")
    if len(patterns) != heads:
        raise ValueError(f"{len(patterns)} patterns: needs {heads}, one a query head")
    devices = {t.device for t in (q, k, v, slots) if t is not None}
    if len(devices | {layout.coordinates.device}) > 1:
        raise ValueError(
            f"q on {q.device}, k on {k.device}, v on {v.device}, layout on {layout.coordinates.device}: "
            "needs one device"
        )
    if any(t.stride(2) != 1 for t in (q, k, v)):
        raise ValueError("q, k, v: need a contiguous last dimension")
