"""Engine "triton": any CUDA GPU, and Triton's interpreter on a CPU. Rows are gathered by pointer, nothing is copied."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import PAD, TILE, HeadGroup, TileLists, device_ints, head_numbers
from mm_sglang.kernels.stages import stage

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = 1.4426950408889634


# fmt: off
@triton.jit
def _tile(acc, top, total, q, k_ptr, v_ptr, slots_ptr, order_row, n, q_pos, keys, kv, k_row, k_head, v_row, v_head,
          factor, PARTIAL: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_ORDER: tl.constexpr, PAD: tl.constexpr,
          TILE: tl.constexpr, D: tl.constexpr):
    """One step of the online softmax (base 2). Only a partial tile tests positions."""
    slot = n * TILE + tl.arange(0, TILE)
    if HAS_ORDER:
        position = tl.load(order_row + slot)
        live = position != PAD
    else:
        position = slot
        live = slot < keys
    row = tl.where(live, position, 0)
    if HAS_SLOTS:
        row = tl.load(slots_ptr + row)
    dim = tl.arange(0, D)
    row = row.to(tl.int64)
    k_at = k_ptr + row[None, :] * k_row + kv * k_head + dim[:, None]
    v_at = v_ptr + row[:, None] * v_row + kv * v_head + dim[None, :]
    if PARTIAL:
        k = tl.load(k_at, mask=live[None, :], other=0.0)
        v = tl.load(v_at, mask=live[:, None], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * factor
        s = tl.where((position[None, :] <= q_pos[:, None]) & live[None, :], s, float("-inf"))
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
        s = tl.dot(q, k, input_precision="ieee") * factor
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return acc, new, total


@triton.jit(do_not_specialize=[
    "first", "prefix", "queries", "keys", "q_rows", "k_slots", "width", "partial_width", "lse_head"
])
def _forward(q_ptr, k_ptr, v_ptr, slots_ptr, q_order_ptr, k_order_ptr, heads_ptr, kv_ptr, full_count_ptr, full_ptr,
             partial_count_ptr, partial_ptr, out_ptr, lse_ptr, first, prefix, queries, keys, q_rows, k_slots, g, width,
             partial_width, factor, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, lse_head,
             HAS_SLOTS: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_K_ORDER: tl.constexpr, PAD: tl.constexpr,
             TILE: tl.constexpr, D: tl.constexpr):
    """One query tile of one head. Query tiles run fastest: neighbours read the same columns and nearby diagonals."""
    m, member = tl.program_id(0), tl.program_id(1)
    r = member // g
    head = tl.load(heads_ptr + member)
    if head >= 0:
        kv = tl.load(kv_ptr + r)
        at = (first + m) * TILE + tl.arange(0, TILE)
        if HAS_Q_ORDER:
            q_pos = tl.load(q_order_ptr + r.to(tl.int64) * q_rows + at)
            live = q_pos != PAD
        else:
            q_pos = at + prefix
            live = at < queries
        row = tl.where(live, q_pos - prefix, 0).to(tl.int64)
        dim = tl.arange(0, D)
        q = tl.load(q_ptr + row[:, None] * q_row + head * q_head + dim[None, :], mask=live[:, None], other=0.0)
        acc = tl.zeros([TILE, D], tl.float32)
        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        order_row = k_order_ptr + r.to(tl.int64) * k_slots
        entry = member.to(tl.int64) * tl.num_programs(0) + m
        for i in range(0, tl.load(full_count_ptr + entry)):
            n = tl.load(full_ptr + entry * width + i)
            acc, top, total = _tile(acc, top, total, q, k_ptr, v_ptr, slots_ptr, order_row, n, q_pos, keys, kv, k_row,
                                    k_head, v_row, v_head, factor, False, HAS_SLOTS, HAS_K_ORDER, PAD, TILE, D)
        for i in range(0, tl.load(partial_count_ptr + entry)):
            n = tl.load(partial_ptr + entry * partial_width + i)
            acc, top, total = _tile(acc, top, total, q, k_ptr, v_ptr, slots_ptr, order_row, n, q_pos, keys, kv, k_row,
                                    k_head, v_row, v_head, factor, True, HAS_SLOTS, HAS_K_ORDER, PAD, TILE, D)
        seen = total > 0
        result = acc / tl.where(seen, total, 1.0)[:, None]
        out = out_ptr + row[:, None] * out_row + head * out_head + dim[None, :]
        tl.store(out, result.to(q.dtype), mask=live[:, None])
        lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
        tl.store(lse_ptr + head.to(tl.int64) * lse_head + row, lse, mask=live)
# fmt: on


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
    """As attend.reference.attend; one launch over all heads and query tiles of a slice."""
    for first, last in group.slices():
        lists = group.lists(first, last)
        with stage("attend"):
            attend_tiles(q, k, v, slots, group, lists, scale, out, lse)


def attend_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor | None,
    group: HeadGroup,
    lists: TileLists,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """The query tiles of `lists` only."""
    g, tiles = len(group.heads[0]), lists.full_count.shape[1]
    q_order, k_order = group.q_order, group.k_order
    _forward[(tiles, len(group.heads) * g)](
        q, k, v, q if slots is None else slots, q if q_order is None else q_order, q if k_order is None else k_order,
        head_numbers(group.heads, q.device), device_ints(group.kv_head, q.device),
        lists.full_count, lists.full_index, lists.partial_count, lists.partial_index, out, lse, lists.first,
        group.prefix, group.queries, group.keys, group.query_tiles * TILE, group.key_tiles * TILE, g,
        lists.full_index.shape[2], lists.partial_index.shape[2], scale * LOG2E, q.stride(0), q.stride(1), k.stride(0),
        k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1), lse.stride(0), HAS_SLOTS=slots is not None,
        HAS_Q_ORDER=q_order is not None, HAS_K_ORDER=k_order is not None, PAD=PAD, TILE=TILE, D=q.shape[2], num_warps=8,
        num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
