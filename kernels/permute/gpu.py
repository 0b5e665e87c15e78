"""GPU twin of permute/reference.py in Triton: two passes of counting, no sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import PAD, TILE

BLOCK = 2048
BLOCKS = tuple(4**n for n in range(3, 9))  # few, because each is a kernel of its own


@triton.jit
def _segment(kept_ptr, class_ptr, r, at, count, HAS_CLASS: tl.constexpr):
    """Segment of each entry; -1 past the end."""
    live = at < count
    kept = tl.load(kept_ptr + r.to(tl.int64) * count + at, mask=live, other=0)
    other = tl.load(class_ptr + at, mask=live, other=0).to(tl.int32) if HAS_CLASS else 1
    return tl.where(live, tl.where(kept != 0, 0, other), -1)


@triton.jit(do_not_specialize=["kept_ptr", "class_ptr", "count"])
def _count(kept_ptr, class_ptr, partial_ptr, count, S: tl.constexpr, HAS_CLASS: tl.constexpr, BLOCK: tl.constexpr):
    block, r = tl.program_id(0), tl.program_id(1)
    segment = _segment(kept_ptr, class_ptr, r, block * BLOCK + tl.arange(0, BLOCK), count, HAS_CLASS)
    for s in tl.static_range(S):
        held = tl.sum((segment == s).to(tl.int32), 0)
        tl.store(partial_ptr + (r * S + s) * tl.num_programs(0) + block, held)


@triton.jit(do_not_specialize=["kept_ptr", "class_ptr", "count", "width"])
def _place(
    kept_ptr,
    class_ptr,
    partial_ptr,
    order_ptr,
    start_ptr,
    rank_ptr,
    count,
    width,
    S: tl.constexpr,
    HAS_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Slots of one block of entries: those before it are counted in `partial`, those inside by a prefix sum."""
    block, r, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    segment = _segment(kept_ptr, class_ptr, r, at, count, HAS_CLASS)
    number = tl.arange(0, BLOCKS)
    begin = 0
    for s in tl.static_range(S):
        held = tl.load(partial_ptr + (r * S + s) * blocks + number, mask=number < blocks, other=0)
        before = tl.sum(tl.where(number < block, held, 0), 0)
        member = (segment == s).to(tl.int32)
        rank = before + tl.cumsum(member, 0) - member
        slot = begin + rank
        tl.store(order_ptr + r.to(tl.int64) * width + slot, at, mask=(segment == s) & (slot < width))
        rank_row = rank_ptr + (r * S + s).to(tl.int64) * (count + 1)
        tl.store(rank_row + at, rank, mask=at < count)
        total = tl.sum(held, 0)
        if block == 0:
            tl.store(rank_row + count, total)
            tl.store(start_ptr + r * (S + 1) + s, begin)
        begin += (total + TILE - 1) // TILE * TILE
    if block == 0:
        tl.store(start_ptr + r * (S + 1) + S, begin)


def key_order(
    kept: torch.Tensor, classes: torch.Tensor | None, segments: int, tiles: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As permute.reference.key_order."""
    kept = kept.contiguous()
    rows, count = kept.shape
    blocks = -(-count // BLOCK)
    partial = torch.empty(rows * segments * blocks, dtype=torch.int32, device=kept.device)
    order = torch.full((rows, tiles * TILE), PAD, dtype=torch.int32, device=kept.device)
    start = torch.empty(rows, segments + 1, dtype=torch.int32, device=kept.device)
    rank = torch.empty(rows, segments, count + 1, dtype=torch.int32, device=kept.device)
    flags = dict(S=segments, HAS_CLASS=classes is not None, BLOCK=BLOCK)
    bits = kept.view(torch.uint8)
    by_class = bits if classes is None else classes
    _count[(blocks, rows)](bits, by_class, partial, count, **flags, num_warps=4)
    _place[(blocks, rows)](
        bits, by_class, partial, order, start, rank, count, tiles * TILE, **flags,
        BLOCKS=next(n for n in BLOCKS if n >= blocks), TILE=TILE, num_warps=4,
    )  # fmt: skip
    return order, start, rank
