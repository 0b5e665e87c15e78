"""GPU twin of select/blocks_reference.py in Triton, straight into tile lists: scores in slices, no sort, no top-k."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import TILE, HeadGroup, TileLists, head_numbers

SCRATCH = 128 << 20  # bytes of scores at once
ROWS, COLUMNS = 128, 128  # query and key tiles of a block of scores


# fmt: off
@triton.jit(do_not_specialize=["start_ptr", "first", "rows"])
def _hulls(limits_ptr, start_ptr, reached_ptr, whole_ptr, s, segments, first, rows, TILE: tl.constexpr):
    """Tiles (of the whole order) below `whole` are seen by every row of a query tile, those below `reached` by some."""
    m, r = tl.program_id(0), tl.program_id(1)
    at = (first + m) * TILE + tl.arange(0, TILE)
    limit = tl.load(limits_ptr + (r * segments + s).to(tl.int64) * rows + at)
    high = tl.max(limit, 0)
    begin = tl.load(start_ptr + r * (segments + 1) + s)
    out = r * tl.num_programs(0) + m
    tl.store(reached_ptr + out, tl.where(high > begin, (high + TILE - 1) // TILE, begin // TILE))
    tl.store(whole_ptr + out, tl.min(tl.where(limit < 0, 2147483647, limit), 0) // TILE)


@triton.jit(do_not_specialize=["start_ptr", "first", "tiles", "q_tiles", "k_tiles", "all_tiles", "skip", "pitch"])
def _scores(q_ptr, k_ptr, weight_ptr, heads_ptr, start_ptr, reached_ptr, out_ptr, s, segments, g, first, tiles, q_tiles,
            k_tiles, all_tiles, skip, pitch, scale, PARTS: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
            HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Scores of a block of query and key tiles of one head, by part of the queries and not normalised yet; blocks that
    nobody reaches are left as they are."""
    block, member = tl.program_id(1), tl.program_id(2)
    r = member // g
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = block * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(start_ptr + r * (segments + 1) + s) // TILE
    reached = tl.max(tl.load(reached_ptr + r * all_tiles + skip + m, mask=m < tiles, other=0), 0) - begin
    reached = tl.where(tl.load(heads_ptr + member) < 0, 0, reached)
    if block * COLUMNS < reached:
        q_row = (member.to(tl.int64) * q_tiles + first + m) * (PARTS * D)
        k_row = (r.to(tl.int64) * k_tiles + n) * (PARTS * D)
        for own in range(PARTS):
            score = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
            mass = tl.zeros([ROWS, COLUMNS], tl.float32)
            for part in range(PARTS):
                product = tl.zeros([ROWS, COLUMNS], tl.float32)
                for offset in range(0, D, STEP):
                    e = offset + tl.arange(0, STEP)
                    q_at, k_at = own * D + e, part * D + e
                    q = tl.load(q_ptr + q_row[:, None] + q_at[None, :], mask=(m < tiles)[:, None], other=0.0)
                    k = tl.load(k_ptr + k_row[None, :] + k_at[:, None], mask=(n < k_tiles)[None, :], other=0.0)
                    product += tl.dot(q, k, input_precision="ieee")  # fp32 would be rounded to tf32 otherwise
                product *= scale
                if HAS_WEIGHT:
                    where = (r.to(tl.int64) * k_tiles + n) * PARTS + part
                    product += tl.load(weight_ptr + where, mask=n < k_tiles, other=0.0)[None, :]
                if PARTS == 1:
                    score = product
                else:
                    top = tl.maximum(score, product)
                    mass = mass * tl.exp(score - top) + tl.exp(product - top)
                    score = top
            if PARTS > 1:
                score += tl.log(mass)
            out = ((member.to(tl.int64) * tiles + m) * PARTS + own)[:, None] * pitch + n[None, :]
            tl.store(out_ptr + out, score, mask=(m < tiles)[:, None])  # pitch: a multiple of COLUMNS


@triton.jit
def _total(x):
    """Sum of fp32 [BLOCK] in [0, 1], in whole numbers: the same bits in whatever order, so in a block of any size.

    What a rank of several chooses must not depend on the slices that it does it in.
    """
    return tl.sum((x * 1073741824.0).to(tl.int64), 0).to(tl.float32) * 9.313225746154785e-10  # 2^30, and 2^-30


@triton.jit(do_not_specialize=["start_ptr", "k_tiles", "all_tiles", "skip", "pitch", "keep", "sink", "local", "width",
                               "partial_width"])
def _choose(score_ptr, heads_ptr, start_ptr, reached_ptr, whole_ptr, full_count_ptr, full_ptr, partial_count_ptr,
            partial_ptr, s, segments, g, k_tiles, all_tiles, skip, pitch, keep, coverage, least, sink, local, width,
            partial_width, HAS_COVERAGE: tl.constexpr, HAS_LEAST: tl.constexpr, PARTS: tl.constexpr,
            BLOCK: tl.constexpr, TILE: tl.constexpr):
    """One query tile of one head: bisect for the threshold in the scores' bits, then append in ascending order."""
    m, member = tl.program_id(0), tl.program_id(1)
    r = member // g
    begin = tl.load(start_ptr + r * (segments + 1) + s) // TILE
    seen = tl.load(reached_ptr + r * all_tiles + skip + m) - begin
    seen = tl.where(tl.load(heads_ptr + member) < 0, 0, tl.minimum(seen, k_tiles))
    n = tl.arange(0, BLOCK)
    visible = n < seen
    pitch = tl.multiple_of(pitch, 16)
    # The mask is not `visible`: `pitch` is a multiple of 16, so loads stay wide; what was never written is dropped.
    row = score_ptr + (member.to(tl.int64) * tl.num_programs(0) + m) * PARTS * pitch + n
    score = tl.full([BLOCK], float("-inf"), tl.float32)
    for part in range(PARTS):
        own = tl.where(visible, tl.load(row + part * pitch, mask=n < pitch, other=0.0), float("-inf"))
        if PARTS == 1:
            score = own
        else:
            highest = tl.maximum(tl.max(own, 0), -3.0e38)  # a row without tiles has a maximum of -inf
            own -= highest + tl.log(tl.maximum(_total(tl.exp(own - highest)), 1e-30))
            top = tl.maximum(score, own)
            score = tl.where(visible, top + tl.log(tl.exp(score - top) + tl.exp(own - top)), float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 is no less than 0.0
    forced = visible & ((n < sink) | (n >= seen - local))
    free = visible & (forced == 0)
    if HAS_COVERAGE or HAS_LEAST:
        mass = tl.exp(score - tl.maximum(tl.max(score, 0), -3.0e38))
        total = _total(mass)
    if HAS_LEAST:
        free = free & (mass >= least * total)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered like the scores
    key = tl.where(free, key, -2147483648)  # below every score's
    room = tl.maximum(keep - tl.sum(forced.to(tl.int32), 0), 0)
    if HAS_COVERAGE:
        need = coverage * total - _total(tl.where(forced, mass, 0.0))
    # The threshold: the greatest key at or above which there are enough. `low` has enough or is below all keys.
    low = tl.full([], -2147483648, tl.int32)
    high = tl.max(key, 0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        above = key >= middle
        number = tl.sum(above.to(tl.int32), 0)
        enough = number >= room
        if HAS_COVERAGE:
            enough = enough | (_total(tl.where(above, mass, 0.0)) >= need)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        if not HAS_COVERAGE:
            high = tl.where(number == room, low, high)  # a gap: any threshold in it is as good
    more = key > low
    tie = free & (key == low)
    place = tl.cumsum(tie.to(tl.int32), 0)  # of equal scores the first
    tie = tie & (place <= room - tl.sum(more.to(tl.int32), 0))
    if HAS_COVERAGE:
        held, each = _total(tl.where(more, mass, 0.0)), tl.max(tl.where(tie, mass, 0.0), 0)
        tie = tie & (held + (place - 1).to(tl.float32) * each < need)
    chosen = forced | more | tie
    whole = tl.load(whole_ptr + r * all_tiles + skip + m) - begin
    in_full = tl.sum((chosen & (n < whole)).to(tl.int32), 0)
    in_all = tl.sum(chosen.to(tl.int32), 0)
    at = tl.cumsum(chosen.to(tl.int32), 0) - 1  # the full ones come first
    out = member.to(tl.int64) * all_tiles + skip + m
    fulls = tl.load(full_count_ptr + out)
    partials = tl.load(partial_count_ptr + out)
    full_row, partial_row = full_ptr + out * width + fulls, partial_ptr + out * partial_width + partials
    tl.store(full_row + at, begin + n, mask=chosen & (n < whole) & (at < width - fulls))
    at -= in_full
    tl.store(partial_row + at, begin + n, mask=chosen & (n >= whole) & (at < partial_width - partials))
    tl.store(full_count_ptr + out, tl.minimum(fulls + in_full, width))
    tl.store(partial_count_ptr + out, tl.minimum(partials + in_all - in_full, partial_width))
# fmt: on


def append_blocks(group: HeadGroup, s: int, lists: TileLists, first: int, last: int) -> None:
    """Append the tiles that segment s's block scores choose for query tiles [first, last) of every head to `lists`.

    `lists` is of the same query tiles; what does not fit its width is dropped. Segments of up to 32768 tiles.
    """
    blocks = group.segments[s].blocks
    assert blocks is not None
    device, segments, g, orders = group.limits.device, len(group.segments), len(group.heads[0]), len(group.heads)
    tiles, k_tiles, size = last - first, blocks.k.shape[1], blocks.q.shape[2] // blocks.parts
    heads = head_numbers(group.heads, device)
    reached = torch.empty(orders, tiles, dtype=torch.int32, device=device)
    whole = torch.empty_like(reached)
    _hulls[(tiles, orders)](
        group.limits, group.start, reached, whole, s, segments, first, group.limits.shape[2], TILE=TILE, num_warps=1
    )
    step = max(1, SCRATCH // (4 * orders * g * blocks.parts * triton.cdiv(k_tiles, COLUMNS) * COLUMNS))
    step = step // ROWS * ROWS or step
    rows = ROWS if min(step, tiles) > ROWS // 2 and blocks.parts == 1 else ROWS // 2  # parts need registers for a sum
    half = blocks.q.element_size() == 2
    for skip in range(0, tiles, step):
        own = min(step, tiles - skip)
        most = k_tiles
        if group.q_order is None:  # no query tile of this slice sees more keys than there are up to its last position
            most = min(k_tiles, -(-(group.prefix + (first + skip + own) * TILE) // TILE))
        pitch = triton.cdiv(most, COLUMNS) * COLUMNS
        score = torch.empty(orders * g, own, blocks.parts, pitch, device=device)
        _scores[(triton.cdiv(own, rows), triton.cdiv(most, COLUMNS), orders * g)](
            blocks.q, blocks.k, blocks.k if blocks.weight is None else blocks.weight, heads, group.start, reached,
            score, s, segments, g, first + skip, own, blocks.q.shape[1], k_tiles, tiles, skip, pitch, blocks.scale,
            PARTS=blocks.parts, D=size, STEP=min(64 if half else 32, size), HAS_WEIGHT=blocks.weight is not None,
            ROWS=rows, COLUMNS=COLUMNS, TILE=TILE, num_warps=rows // 16 if blocks.parts == 1 else 8,
        )  # fmt: skip
        block = max(512, triton.next_power_of_2(most))
        _choose[(own, orders * g)](
            score, heads, group.start, reached, whole, lists.full_count, lists.full_index, lists.partial_count,
            lists.partial_index, s, segments, g, k_tiles, tiles, skip, pitch, blocks.keep,
            0.0 if blocks.coverage is None else blocks.coverage, blocks.least, blocks.sink, blocks.local,
            lists.full_index.shape[2], lists.partial_index.shape[2], HAS_COVERAGE=blocks.coverage is not None,
            HAS_LEAST=blocks.least > 0, PARTS=blocks.parts, BLOCK=block, TILE=TILE,
            num_warps=min(32, max(1, block // 512)), maxnreg=64,  # 32 warps of it an SM, for a few spills at the end
        )  # fmt: skip
