"""Copies in a group's order, for an engine whose kernel wants contiguous rows (Triton, one launch each)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import PAD, device_ints, head_numbers


@triton.jit(do_not_specialize=["slots_ptr", "order_ptr", "keys", "slots_of_order"])
def _gather_keys(
    k_ptr,
    v_ptr,
    slots_ptr,
    order_ptr,
    kv_ptr,
    k_out_ptr,
    v_out_ptr,
    keys,
    slots_of_order,
    k_row,
    k_head,
    v_row,
    v_head,
    HAS_SLOTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < slots_of_order
    if HAS_ORDER:
        position = tl.load(order_ptr + r.to(tl.int64) * slots_of_order + at, mask=inside, other=PAD)
        live = position != PAD
    else:
        position = at
        live = at < keys
    position = tl.where(live, position, 0)
    row = tl.load(slots_ptr + position, mask=live, other=0) if HAS_SLOTS else position
    kv = tl.load(kv_ptr + r)
    dim = tl.arange(0, D)
    out = (r.to(tl.int64) * slots_of_order + at)[:, None] * D + dim[None, :]
    row = row.to(tl.int64)[:, None]
    k = tl.load(k_ptr + row * k_row + kv * k_head + dim[None, :], mask=live[:, None], other=0.0)
    tl.store(k_out_ptr + out, k, mask=inside[:, None])  # padding is zero: weight 0 times a stray NaN would be NaN
    v = tl.load(v_ptr + row * v_row + kv * v_head + dim[None, :], mask=live[:, None], other=0.0)
    tl.store(v_out_ptr + out, v, mask=inside[:, None])


def gather_keys(
    k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor | None, order: torch.Tensor | None, kv_head: tuple[int, ...],
    keys: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """k and v as [R, M * TILE, D] in a group's key order (or in prompt order, order None, [R, keys, D]).

    Args:
        k, v: [P, Hkv, D]; slots: int32 [Nk] row of each position, or None; order: int32 [R, M * TILE], PAD: zeros.
    """
    rows, count, dim = len(kv_head), keys if order is None else order.shape[1], k.shape[2]
    out = torch.empty(2, rows, count, dim, dtype=k.dtype, device=k.device)
    _gather_keys[(triton.cdiv(count, 64), rows)](
        k, v, k if slots is None else slots, k if order is None else order, device_ints(kv_head, k.device), out[0],
        out[1], keys, count, k.stride(0), k.stride(1), v.stride(0), v.stride(1), HAS_SLOTS=slots is not None,
        HAS_ORDER=order is not None, PAD=PAD, D=dim, BLOCK=64, num_warps=4,
    )  # fmt: skip
    return out[0], out[1]


@triton.jit(do_not_specialize=["order_ptr", "prefix", "queries", "first", "rows", "order_rows", "lse_head"])
def _move_queries(
    x_ptr,
    copy_ptr,
    lse_ptr,
    lse_copy_ptr,
    order_ptr,
    heads_ptr,
    prefix,
    queries,
    first,
    rows,
    order_rows,
    g,
    x_row,
    x_head,
    lse_head,
    GATHER: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    PAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    member = tl.program_id(1)
    r = member // g
    head = tl.load(heads_ptr + member)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < rows
    if HAS_ORDER:
        position = tl.load(order_ptr + r.to(tl.int64) * order_rows + first + at, mask=inside, other=PAD)
        live = (position != PAD) & (head >= 0)
        row = position - prefix
    else:
        row = first + at
        live = inside & (row < queries) & (head >= 0)
    row = tl.where(live, row, 0).to(tl.int64)
    dim = tl.arange(0, D)
    x = x_ptr + row[:, None] * x_row + head * x_head + dim[None, :]
    # the copy is [R, rows, g, D]
    copy = copy_ptr + ((r * rows + at).to(tl.int64) * g + member % g)[:, None] * D + dim[None, :]
    if GATHER:
        tl.store(copy, tl.load(x, mask=live[:, None], other=0.0), mask=inside[:, None])
    else:
        tl.store(x, tl.load(copy, mask=live[:, None], other=0.0), mask=live[:, None])
        lse = tl.load(lse_copy_ptr + member.to(tl.int64) * rows + at, mask=live, other=0.0)
        tl.store(lse_ptr + head * lse_head + row, lse, mask=live)


def gather_queries(
    q: torch.Tensor, order: torch.Tensor | None, heads: tuple[tuple[int, ...], ...], prefix: int, first: int, rows: int
) -> torch.Tensor:
    """[R, rows, g, D]: rows [first, first + rows) of a group's query order (None: the chunk's own); PAD rows are zero.

    Args:
        q: [Nq, H, D], row i is position prefix + i; order: int32 [R, Mq * TILE]; heads: [R][g], -1 gives zeros.
    """
    g = len(heads[0])
    out = torch.empty(len(heads), rows, g, q.shape[2], dtype=q.dtype, device=q.device)
    _move(q, out, None, None, order, heads, prefix, first)
    return out


def scatter_queries(
    copy: torch.Tensor, lse_copy: torch.Tensor, order: torch.Tensor | None, heads: tuple[tuple[int, ...], ...],
    prefix: int, first: int, out: torch.Tensor, lse: torch.Tensor,
) -> None:  # fmt: skip
    """The way back: [R, rows, g, D] and its lse [R, g, rows] into out [Nq, H, D] and lse [H, Nq]."""
    _move(out, copy, lse, lse_copy, order, heads, prefix, first)


def _move(
    x: torch.Tensor, copy: torch.Tensor, lse: torch.Tensor | None, lse_copy: torch.Tensor | None,
    order: torch.Tensor | None, heads: tuple[tuple[int, ...], ...], prefix: int, first: int,
) -> None:  # fmt: skip
    g, rows = len(heads[0]), copy.shape[1]
    _move_queries[(triton.cdiv(rows, 64), len(heads) * g)](
        x, copy, x if lse is None else lse, x if lse_copy is None else lse_copy, x if order is None else order,
        head_numbers(heads, x.device), prefix, len(x), first, rows,
        0 if order is None else order.shape[1], g, x.stride(0), x.stride(1), 0 if lse is None else lse.stride(0),
        GATHER=lse is None, HAS_ORDER=order is not None, PAD=PAD, D=x.shape[2], BLOCK=64, num_warps=4,
    )  # fmt: skip
