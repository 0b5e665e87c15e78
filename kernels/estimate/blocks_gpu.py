"""GPU twin of estimate/blocks_reference.py in Triton: one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import EMPTY, PAD, PARTS, TILE, device_ints, head_numbers


# fmt: off
@triton.jit(do_not_specialize=["order_ptr", "slots_ptr", "base", "count", "tiles"])
def _pool(x_ptr, order_ptr, slots_ptr, heads_ptr, out_ptr, base, count, tiles, g, x_row, x_head,
          HAS_ORDER: tl.constexpr, HAS_SLOTS: tl.constexpr, REVERSE: tl.constexpr, PARTS: tl.constexpr,
          PAD: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr):
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
    total = tl.sum(tl.reshape(x, (PARTS, TILE // PARTS, D)), 1)
    number = tl.sum(tl.reshape(live.to(tl.float32), (PARTS, TILE // PARTS)), 1)
    whole = tl.sum(total, 0) / tl.maximum(tl.sum(number, 0), 1.0)
    mean = tl.where((number > 0)[:, None], total / tl.maximum(number, 1.0)[:, None], whole[None, :])
    part = tl.arange(0, PARTS)
    place = PARTS - 1 - part if REVERSE else part
    out = (member.to(tl.int64) * tiles + m) * PARTS * D + place[:, None] * D + dim[None, :]
    tl.store(out_ptr + out, mean)


@triton.jit(do_not_specialize=["order_ptr", "slots_ptr", "count", "tiles"])
def _clusters(x_ptr, order_ptr, slots_ptr, heads_ptr, means_ptr, numbers_ptr, count, tiles, x_row, x_head,
              HAS_ORDER: tl.constexpr, HAS_SLOTS: tl.constexpr, PARTS: tl.constexpr, EMPTY: tl.constexpr,
              PAD: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr):
    """One tile of one head: a row's group is known as soon as the last centre is, as the nearest so far."""
    m, r = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, TILE)
    position = m * TILE + row
    live = position < count
    if HAS_ORDER:
        position = tl.load(order_ptr + r.to(tl.int64) * tiles * TILE + position)
        live = position != PAD
    at = tl.where(live, position, 0)
    if HAS_SLOTS:
        at = tl.load(slots_ptr + position, mask=live, other=0)
    dim = tl.arange(0, D)
    where = at[:, None].to(tl.int64) * x_row + tl.load(heads_ptr + r) * x_head + dim[None, :]
    x = tl.load(x_ptr + where, mask=live[:, None], other=0.0).to(tl.float32)
    centre = tl.sum(x, 0) / tl.maximum(tl.sum(live.to(tl.float32), 0), 1.0)
    nearest = tl.full([TILE], float("inf"), tl.float32)
    group = tl.zeros([TILE], tl.int32)
    for part in tl.static_range(PARTS):
        if part > 0:
            far = tl.argmax(tl.where(live, nearest, -1.0), 0)
            centre = tl.sum(tl.where((row == far)[:, None], x, 0.0), 0)
        apart = x - centre[None, :]
        distance = tl.sum(apart * apart, 1)
        group = tl.where(distance < nearest, part, group)
        nearest = tl.minimum(nearest, distance)
    out = (r.to(tl.int64) * tiles + m) * PARTS
    for part in tl.static_range(PARTS):
        member = live & (group == part)
        number = tl.sum(member.to(tl.float32), 0)
        mean = tl.sum(tl.where(member[:, None], x, 0.0), 0) / tl.maximum(number, 1.0)
        tl.store(means_ptr + (out + part) * D + dim, mean)
        tl.store(numbers_ptr + out + part, tl.where(number > 0, tl.log(tl.maximum(number, 1.0)), EMPTY))
# fmt: on


def pool(
    x: torch.Tensor,
    order: torch.Tensor | None,
    slots: torch.Tensor | None,
    heads: tuple[tuple[int, ...], ...],
    parts: int,
    reverse: bool,
    base: int,
    count: int,
) -> torch.Tensor:
    """As estimate.blocks_reference.pool; D is a power of two."""
    g, dim = len(heads[0]), x.shape[2]
    order = None if order is None else order.contiguous()
    tiles = -(-count // TILE) if order is None else order.shape[1] // TILE
    out = torch.empty(len(heads) * g, tiles, parts * dim, dtype=x.dtype, device=x.device)
    _pool[(tiles, len(heads) * g)](
        x, x if order is None else order, x if slots is None else slots, head_numbers(heads, x.device), out, base,
        count, tiles, g, x.stride(0), x.stride(1), HAS_ORDER=order is not None, HAS_SLOTS=slots is not None,
        REVERSE=reverse, PARTS=parts, PAD=PAD, TILE=TILE, D=dim, num_warps=max(4, dim // 16),
    )  # fmt: skip
    return out


def clusters(
    x: torch.Tensor,
    order: torch.Tensor | None,
    slots: torch.Tensor | None,
    heads: tuple[int, ...],
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As estimate.blocks_reference.clusters; D is a power of two."""
    dim, rows = x.shape[2], len(heads)
    order = None if order is None else order.contiguous()
    tiles = -(-count // TILE) if order is None else order.shape[1] // TILE
    means = torch.empty(rows, tiles, PARTS * dim, dtype=x.dtype, device=x.device)
    numbers = torch.empty(rows, tiles, PARTS, device=x.device)
    _clusters[(tiles, rows)](
        x, x if order is None else order, x if slots is None else slots, device_ints(heads, x.device), means, numbers,
        count, tiles, x.stride(0), x.stride(1), HAS_ORDER=order is not None, HAS_SLOTS=slots is not None, PARTS=PARTS,
        EMPTY=EMPTY, PAD=PAD, TILE=TILE, D=dim, num_warps=max(4, dim // 16),
    )  # fmt: skip
    return means, numbers
