"""GPU twin of estimate/blocks_reference.py in Triton: one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import PAD, TILE, head_numbers


# fmt: off
@triton.jit(do_not_specialize=["order_ptr", "slots_ptr", "base", "count", "tiles"])
def _pool(x_ptr, order_ptr, slots_ptr, heads_ptr, out_ptr, base, count, tiles, g, x_row, x_head,
          HAS_ORDER: tl.constexpr, HAS_SLOTS: tl.constexpr, REVERSE: tl.constexpr, RUNS: tl.constexpr,
          STRIDE: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr):
    m, member = tl.program_id(0), tl.program_id(1)
    r = member // g
    head = tl.load(heads_ptr + member)
    at = m * TILE + tl.arange(0, TILE)
    if HAS_ORDER:
        position = tl.load(order_ptr + r.to(tl.int64) * tiles * TILE + at)
        live = position != PAD
    else:
        position = at + base
        live = at < count
    live = live & (tl.zeros([TILE], tl.int32) + head >= 0)
    row = tl.load(slots_ptr + position, mask=live, other=0) if HAS_SLOTS else tl.where(live, position - base, 0)
    dim = tl.arange(0, D)
    where = row[:, None].to(tl.int64) * x_row + tl.maximum(head, 0) * x_head + dim[None, :]
    x = tl.load(x_ptr + where, mask=live[:, None], other=0.0).to(tl.float32)
    if RUNS:
        total = tl.sum(tl.reshape(x, (STRIDE, TILE // STRIDE, D)), 1)
        number = tl.sum(tl.reshape(live.to(tl.float32), (STRIDE, TILE // STRIDE)), 1)
    else:
        total = tl.sum(tl.reshape(x, (TILE // STRIDE, STRIDE, D)), 0)
        number = tl.sum(tl.reshape(live.to(tl.float32), (TILE // STRIDE, STRIDE)), 0)
    mean = total / tl.maximum(number, 1.0)[:, None]
    if RUNS:
        whole = tl.sum(total, 0) / tl.maximum(tl.sum(number, 0), 1.0)
        mean = tl.where((number > 0)[:, None], mean, whole[None, :])
    residue = tl.arange(0, STRIDE)
    place = STRIDE - 1 - residue if REVERSE else residue
    out = (member.to(tl.int64) * tiles + m) * STRIDE * D + place[:, None] * D + dim[None, :]
    tl.store(out_ptr + out, mean)
# fmt: on


def pool(
    x: torch.Tensor,
    order: torch.Tensor | None,
    slots: torch.Tensor | None,
    heads: tuple[tuple[int, ...], ...],
    stride: int,
    reverse: bool,
    base: int,
    count: int,
    runs: bool = False,
) -> torch.Tensor:
    """As estimate.blocks_reference.pool; D is a power of two."""
    g, dim = len(heads[0]), x.shape[2]
    order = None if order is None else order.contiguous()
    tiles = -(-count // TILE) if order is None else order.shape[1] // TILE
    out = torch.empty(len(heads) * g, tiles, stride * dim, dtype=x.dtype, device=x.device)
    _pool[(tiles, len(heads) * g)](
        x, x if order is None else order, x if slots is None else slots,
        head_numbers(heads, x.device), out, base, count, tiles, g, x.stride(0),
        x.stride(1), HAS_ORDER=order is not None, HAS_SLOTS=slots is not None, REVERSE=reverse, RUNS=runs,
        STRIDE=stride, PAD=PAD, TILE=TILE, D=dim, num_warps=max(4, dim // 16),
    )  # fmt: skip
    return out
