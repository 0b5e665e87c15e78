"""GPU twin of tiles/reference.py in Triton: lists are written directly, in time and memory of their own length."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import BUCKET, PAD, TILE, HeadGroup, TileLists, head_numbers
from mm_sglang.kernels.select.blocks_gpu import append_blocks


@triton.jit(do_not_specialize=["prefix", "queries", "keys", "rows"])
def _limits(
    start_ptr,
    rank_ptr,
    order_ptr,
    out_ptr,
    prefix,
    queries,
    keys,
    rows,
    S: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, r = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    if HAS_ORDER:
        position = tl.load(order_ptr + r.to(tl.int64) * rows + at, mask=at < rows, other=PAD)
    else:
        position = tl.where(at < queries, at + prefix, PAD)
    real = position != PAD
    seen = tl.where(real, position + 1, 0)
    for s in tl.static_range(S):
        low = tl.load(start_ptr + r * (S + 1) + s)
        if HAS_RANK:
            limit = low + tl.load(rank_ptr + (r * S + s).to(tl.int64) * (keys + 1) + seen)
        else:
            limit = tl.maximum(tl.minimum(seen, tl.load(start_ptr + r * (S + 1) + s + 1)), low)
        tl.store(out_ptr + (r * S + s).to(tl.int64) * rows + at, tl.where(real, limit, -1), mask=at < rows)


def limits(
    start: torch.Tensor, rank: torch.Tensor | None, q_order: torch.Tensor | None, prefix: int, queries: int
) -> torch.Tensor:
    """As tiles.reference.limits."""
    count, segments = len(start), start.shape[1] - 1
    q_order = None if q_order is None else q_order.contiguous()
    rows = -(-queries // TILE) * TILE if q_order is None else q_order.shape[1]
    out = torch.empty(count, segments, rows, dtype=torch.int32, device=start.device)
    _limits[(triton.cdiv(rows, 1024), count)](
        start, start if rank is None else rank, start if q_order is None else q_order, out, prefix, queries,
        0 if rank is None else rank.shape[2] - 1, rows, S=segments, HAS_RANK=rank is not None,
        HAS_ORDER=q_order is not None, PAD=PAD, BLOCK=1024,
    )  # fmt: skip
    return out


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def _slot(rank_row, position, low, high, HAS_RANK: tl.constexpr):
    """First slot of the segment whose key is at `position` or later."""
    return low + tl.load(rank_row + position) if HAS_RANK else tl.maximum(tl.minimum(position, high), low)


@triton.jit
def _range(
    index_ptr,
    at,
    count,
    q_low,
    q_high,
    keys,
    rank_row,
    low,
    high,
    HAS_RANK: tl.constexpr,
    TILE: tl.constexpr,
    BUCKET: tl.constexpr,
):
    """First and last tile that bucket number `at` of a list runs through; last is -1 if there is none."""
    live = (at >= 0) & (at < count)
    bucket = tl.load(index_ptr + at, mask=live, other=0)
    near = tl.minimum(tl.maximum(q_low - bucket * BUCKET - BUCKET + 1, 0), keys)
    far = tl.minimum(tl.maximum(q_high - bucket * BUCKET + 1, 0), keys)
    a, b = _slot(rank_row, near, low, high, HAS_RANK), _slot(rank_row, far, low, high, HAS_RANK)
    return a // TILE, tl.where(live & (b > a), (b - 1) // TILE, -1)


@triton.jit(
    do_not_specialize=[
        "start_ptr",
        "rank_ptr",
        "index_ptr",
        "count_ptr",
        "first",
        "prefix",
        "queries",
        "keys",
        "rows",
        "longest",
        "width",
        "partial_width",
    ]
)
def _append(
    heads_ptr,
    start_ptr,
    rank_ptr,
    limits_ptr,
    order_ptr,
    index_ptr,
    count_ptr,
    full_count_ptr,
    full_ptr,
    partial_count_ptr,
    partial_ptr,
    s,
    segments,
    g,
    first,
    prefix,
    queries,
    keys,
    rows,
    longest,
    width,
    partial_width,
    FRESH: tl.constexpr,
    HAS_BANDS: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
    BUCKET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Append one segment's tiles to the lists of one head and query tile: all reached ones, or those on bands.

    Tiles below `whole` are full and the others partial; as tiles come ascending, so do both lists.
    """
    m, member = tl.program_id(0), tl.program_id(1)
    r = member // g
    tile = first + m
    at = tl.arange(0, TILE)
    limit = tl.load(limits_ptr + (r * segments + s).to(tl.int64) * rows + tile * TILE + at)
    high = tl.max(limit, 0)
    whole = tl.min(tl.where(limit < 0, 2147483647, limit), 0) // TILE
    low_slot = tl.load(start_ptr + r * (segments + 1) + s)
    high_slot = tl.load(start_ptr + r * (segments + 1) + s + 1)
    reached = tl.where(high > low_slot, (high + TILE - 1) // TILE, 0)  # tiles below this hold a key somebody sees
    if tl.load(heads_ptr + member) < 0:
        reached = 0
    out = member.to(tl.int64) * tl.num_programs(0) + m
    fulls = 0
    partials = 0
    if not FRESH:
        fulls = tl.load(full_count_ptr + out)
        partials = tl.load(partial_count_ptr + out)
    full_row, partial_row = full_ptr + out * width, partial_ptr + out * partial_width
    number = tl.arange(0, BLOCK)
    if HAS_BANDS:
        if HAS_ORDER:
            position = tl.load(order_ptr + r.to(tl.int64) * rows + tile * TILE + at)
            q_low = tl.min(position, 0)
            q_high = tl.max(tl.where(position == PAD, -1, position), 0)
        else:
            q_low = prefix + tile * TILE
            q_high = tl.minimum(prefix + tile * TILE + TILE, prefix + queries) - 1
        held = tl.load(count_ptr + member)
        index = index_ptr + member.to(tl.int64) * longest
        rank_row = rank_ptr + (r * segments + s).to(tl.int64) * (keys + 1)
        done = -1  # last tile listed so far
        for offset in range(0, held, BLOCK):
            a, e = _range(
                index, offset + number, held, q_low, q_high, keys, rank_row, low_slot, high_slot, HAS_RANK, TILE, BUCKET
            )
            _, before = _range(
                index,
                offset + number - 1,
                held,
                q_low,
                q_high,
                keys,
                rank_row,
                low_slot,
                high_slot,
                HAS_RANK,
                TILE,
                BUCKET,
            )
            e = tl.minimum(e, reached - 1)
            before = tl.minimum(before, reached - 1)
            before = tl.maximum(tl.associative_scan(before, 0, _maximum), done)  # neighbours share tiles: list once
            a = tl.maximum(a, before + 1)
            size = tl.maximum(e - a + 1, 0)
            in_full = tl.minimum(tl.maximum(whole - a, 0), size)
            in_partial = size - in_full
            full_at = fulls + tl.cumsum(in_full, 0) - in_full
            partial_at = partials + tl.cumsum(in_partial, 0) - in_partial
            for j in range(0, tl.max(size, 0)):
                f = full_at + j
                tl.store(full_row + f, a + j, mask=(j < in_full) & (f < width))
                p = partial_at + j - in_full
                tl.store(partial_row + p, a + j, mask=(j >= in_full) & (j < size) & (p < partial_width))
            fulls += tl.sum(in_full, 0)
            partials += tl.sum(in_partial, 0)
            done = tl.maximum(done, tl.max(e, 0))
    else:
        begin = low_slot // TILE
        number_full = tl.maximum(tl.minimum(whole, reached) - begin, 0)
        number_all = tl.maximum(reached - begin, 0)
        for offset in range(0, number_all, BLOCK):
            j = offset + number
            tl.store(full_row + fulls + j, begin + j, mask=(j < number_full) & (fulls + j < width))
            p = partials + j - number_full
            tl.store(partial_row + p, begin + j, mask=(j >= number_full) & (j < number_all) & (p < partial_width))
        fulls += number_full
        partials += number_all - number_full
    tl.store(full_count_ptr + out, tl.minimum(fulls, width))
    tl.store(partial_count_ptr + out, tl.minimum(partials, partial_width))


def tile_lists(group: HeadGroup, first: int, last: int) -> TileLists:
    """As tiles.reference.tile_lists, in lists of group.width entries."""
    device, segments, g = group.limits.device, len(group.segments), len(group.heads[0])
    members, tiles = len(group.heads) * g, last - first
    # Queries in order are a run of positions: of each segment at most two tiles straddle it.
    partial_width = group.width if group.q_order is not None else min(2 * segments, group.width)
    lists = TileLists(
        first=first,
        full_count=torch.empty(members, tiles, dtype=torch.int32, device=device),
        full_index=torch.empty(members, tiles, group.width, dtype=torch.int32, device=device),
        partial_count=torch.empty(members, tiles, dtype=torch.int32, device=device),
        partial_index=torch.empty(members, tiles, partial_width, dtype=torch.int32, device=device),
    )
    heads = head_numbers(group.heads, device)
    start, rank, order = group.start, group.rank, group.q_order
    fresh = True
    for s, segment in enumerate(group.segments):
        if segment.blocks is not None:
            if fresh:
                lists.full_count.zero_()
                lists.partial_count.zero_()
            append_blocks(group, s, lists, first, last)
        else:
            bands = segment.bands
            _append[(tiles, members)](
                heads, start, start if rank is None else rank, group.limits,
                start if order is None else order, start if bands is None else bands.index,
                start if bands is None else bands.count, lists.full_count, lists.full_index, lists.partial_count,
                lists.partial_index, s, segments, g, first, group.prefix, group.queries, group.keys,
                group.limits.shape[2], 0 if bands is None else bands.index.shape[1], group.width, partial_width,
                FRESH=fresh, HAS_BANDS=bands is not None, HAS_RANK=rank is not None, HAS_ORDER=order is not None,
                PAD=PAD, TILE=TILE, BUCKET=BUCKET, BLOCK=64, num_warps=1,
            )  # fmt: skip
        fresh = False
    return lists
