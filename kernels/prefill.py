"""Sparse prefill of one chunk of one request: estimate, select, permute, plan, attend.

Legend: Nq queries of the chunk, Nk = prefix + Nq keys, H query heads, Hkv KV heads, D head dimension, P rows of a pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mm_sglang.kernels import classes
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.grouping import groups_of, text_tail
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import Ops
from mm_sglang.kernels.patterns.auto import Auto
from mm_sglang.kernels.patterns.base import HeadPattern
from mm_sglang.kernels.patterns.dense import Dense
from mm_sglang.kernels.plan import HeadGroup, Plan
from mm_sglang.kernels.share import Share, Team


def make_plan(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    layout: TokenLayout,
    patterns: Sequence[HeadPattern],
    scale: float,
    ops: Ops,
    slots: torch.Tensor | None = None,
    tail: int = 0,
) -> Plan:
    """Choose what this chunk's queries attend, from the prompt itself. Arguments and errors: see `sparse_prefill`."""
    _check(q, k, k, layout, patterns, slots)
    return Plan(
        prefix=layout.length - len(q), queries=len(q), heads=q.shape[1],
        groups=tuple(_groups(q, k, slots, layout, patterns, tail, scale, ops, None)),
    )  # fmt: skip


def _groups(
    q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None, layout: TokenLayout, patterns: Sequence[HeadPattern],
    tail: int, scale: float, ops: Ops, team: Team | None,
) -> Iterator[HeadGroup]:  # fmt: skip
    if classes.is_question(layout, len(q), tail):
        patterns = [Dense()] * len(patterns)
    for pattern in dict.fromkeys(patterns):  # heads of equal recipes form groups, in order of first use
        yield from groups_of(q, k, slots, layout, patterns, pattern, scale, ops, team)
    last = text_tail(q, k, slots, layout, patterns, tail, scale, ops)
    if last is not None:
        yield last


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
    out: torch.Tensor | None = None,
    share: Share | None = None,
    tail: int = 0,
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
        out: where to write, [Nq, H, D] in q's dtype, heads next to each other; None: new memory.
        tail: so many of the chunk's last queries at most, if they are text after all that is shown, attend every key.
            A question comes last and looks anything up; TriangleMix (arXiv 2507.21526) keeps the last rows of all
            layers dense for the same reason.
        share: this rank's share of the plan; rows of out that it neither ran nor got are undefined then, and lse is
            NaN where it did not run.

    Returns:
        out, lse [Nq, H] fp32 (natural logarithm), and the whole plan.

    Raises:
        ValueError: shapes, dtypes, devices or lengths that don't fit each other or the engine; before any launch.
    """
    _check(q, k, v, layout, patterns, slots)
    engine.check(q)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or out.dtype != q.dtype or out.device != q.device or not out.is_contiguous():
        raise ValueError(
            f"out {tuple(out.shape)} {out.dtype} on {out.device}: needs contiguous {tuple(q.shape)} {q.dtype} "
            f"on {q.device}"
        )
    lse = torch.empty(q.shape[1], len(q), device=q.device)
    if share is not None:
        lse.fill_(torch.nan)
    groups, team = [], None if share is None else share.team
    for group in _groups(q, k, slots, layout, patterns, tail, scale, engine.ops(), team):
        part = group if share is None else share.begin(group)
        if part is not None:
            engine.attend(q, k, v, slots, part, scale, out, lse)  # at once: the device works while the next is planned
            if part.pattern.residual and not part.everything:
                engine.ops().residual(q, k, v, slots, part, scale, out, lse)
        if share is not None:
            share.end(group, out)
        groups.append(group)
    plan = Plan(prefix=layout.length - len(q), queries=len(q), heads=q.shape[1], groups=tuple(groups))
    return out, lse.T, plan


def sparse_prefill_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    queries: Sequence[int],
    layouts: Sequence[TokenLayout],
    patterns: Sequence[HeadPattern],
    scale: float,
    engine: Engine,
    slots: Sequence[torch.Tensor] | None = None,
    tail: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, list[Plan]]:
    """Chunks of several prompts of different lengths; each has a plan, and launches, of its own.

    Args:
        q: [sum(queries), H, D], the chunks one after another.
        k, v: [sum of the layouts' lengths, Hkv, D], the prompts' keys one after another, or a paged pool with `slots`.
        queries: of each chunk; layouts: of each prompt up to its chunk's end; slots: of each prompt, or None.
        patterns, scale, engine, tail: as for `sparse_prefill`, for all prompts.

    Returns:
        out [sum(queries), H, D], lse [sum(queries), H] fp32, and each chunk's plan.

    Raises:
        ValueError: as `sparse_prefill`, for any of the chunks, before any launch.
    """
    numbers = {"queries": len(queries), "layouts": len(layouts)} | ({} if slots is None else {"slots": len(slots)})
    if len(set(numbers.values())) > 1 or not queries:
        raise ValueError(f"{numbers}: needs one of each a prompt, and at least one prompt")
    if min(queries) < 1 or sum(queries) != len(q):
        raise ValueError(f"queries={list(queries)}: needs at least one each and {len(q)} together, as q has rows")
    lengths = [layout.length for layout in layouts]
    if slots is None and sum(lengths) != len(k):
        raise ValueError(f"layouts of {lengths} positions: needs {len(k)} together, as k has rows")
    calls: list[dict[str, Any]] = []
    row = key = 0
    for number, (count, layout) in enumerate(zip(queries, layouts, strict=True)):
        keys = slice(None) if slots is not None else slice(key, key + layout.length)
        calls.append(
            {"q": q[row : row + count], "k": k[keys], "v": v[keys], "layout": layout, "patterns": patterns,
             "slots": None if slots is None else slots[number]}
        )  # fmt: skip
        _check(**calls[-1])
        row, key = row + count, key + layout.length
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    parts, results = out.split_with_sizes(list(queries)), []
    for call, part in zip(calls, parts, strict=True):
        results.append(sparse_prefill(**call, scale=scale, engine=engine, out=part, tail=tail))
    return out, torch.cat([lse for _, lse, _ in results]), [plan for _, _, plan in results]


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
    if any(isinstance(pattern, Auto) for pattern in patterns):
        raise ValueError("patterns: auto: has to be chosen first: needs what kernels.choosing.choose returns for it")
    devices = {t.device for t in (q, k, v, slots) if t is not None}
    if len(devices | {layout.coordinates.device}) > 1:
        raise ValueError(
            f"q on {q.device}, k on {k.device}, v on {v.device}, layout on {layout.coordinates.device}: "
            "needs one device"
        )
    if any(t.stride(2) != 1 for t in (q, k, v)):
        raise ValueError("q, k, v: need a contiguous last dimension")
