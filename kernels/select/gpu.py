"""GPU twin of select/reference.py in Triton: a radix search for the threshold, six bits a pass, instead of a sort.

Masses are weights of a softmax, in [0, 1]: the top bits of their fp32 form (`grade` in the reference) are ordered like
they are and stay below 2^12. A pass counts into 64 bins of the range that is left; every program sums the pass before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.plan import Bands
from mm_sglang.kernels.select.reference import DROPPED_BITS

BLOCK = 4096
BUCKETS = (1 << 10, 1 << 12, *(1 << n for n in range(14, 21)))  # sizes of a row: few, as each is a kernel of its own
FORCED = 4095  # key of what is kept whatever its mass: above the grade of 1.0
PASSES = 2
DROPPED = tl.constexpr(DROPPED_BITS)


@triton.jit
def _keys(mass_ptr, allowed_ptr, r, at, count, forced, HAS_ALLOWED: tl.constexpr, FORCED: tl.constexpr):
    """Order-preserving integer keys (0: not eligible) and the masses of the eligible."""
    live = at < count
    if HAS_ALLOWED:
        live = live & (tl.load(allowed_ptr + at, mask=live, other=0) != 0)
    mass = tl.load(mass_ptr + r.to(tl.int64) * count + at, mask=live, other=0.0)
    key = tl.minimum(mass.to(tl.int32, bitcast=True) >> DROPPED, FORCED - 1)
    return tl.where(live, tl.where(at < forced, FORCED, key), 0), mass


@triton.jit
def _narrow(
    state_ptr, counts_ptr, sums_ptr, r, shift, keep, coverage, blocks, HAS_COVERAGE: tl.constexpr, BLOCKS: tl.constexpr
):
    """Which of the last pass's 64 bins holds the threshold: (its base, entries above it, mass above it, all mass)."""
    base = tl.load(state_ptr + r * 4).to(tl.int32)
    above = tl.load(state_ptr + r * 4 + 1).to(tl.int32)
    bins = tl.arange(0, 64)
    counts = tl.zeros([64], tl.int32)
    sums = tl.zeros([64], tl.float32)
    for offset in range(0, blocks, BLOCKS):
        number = offset + tl.arange(0, BLOCKS)
        at = (r * blocks + number[:, None]) * 64 + bins[None, :]
        counts += tl.sum(tl.load(counts_ptr + at, mask=number[:, None] < blocks, other=0), 0)
        if HAS_COVERAGE:
            sums += tl.sum(tl.load(sums_ptr + at, mask=number[:, None] < blocks, other=0.0), 0)
    inside, inside_mass = tl.sum(counts, 0), tl.sum(sums, 0)
    up = above + inside - (tl.cumsum(counts, 0) - counts)  # entries at or above each bin's base
    enough = up >= keep
    mass_above, total = 0.0, 0.0
    if HAS_COVERAGE:
        mass_above = tl.load(state_ptr + r * 4 + 2).to(tl.float32, bitcast=True)
        total = tl.load(state_ptr + r * 4 + 3).to(tl.float32, bitcast=True)
        total = tl.where(shift == 6, inside_mass, total)  # after the first pass
        up_mass = mass_above + inside_mass - (tl.cumsum(sums, 0) - sums)
        enough = enough | (up_mass >= coverage * total)
    best = tl.max(tl.where(enough, bins, 0), 0)
    above += tl.sum(tl.where(bins > best, counts, 0), 0)
    if HAS_COVERAGE:
        mass_above += tl.sum(tl.where(bins > best, sums, 0.0), 0)
    return base + (best << shift), above, mass_above, total


@triton.jit(do_not_specialize=["mass_ptr", "allowed_ptr", "count", "forced", "keep"])
def _search(
    mass_ptr,
    allowed_ptr,
    old_state_ptr,
    state_ptr,
    old_counts_ptr,
    old_sums_ptr,
    counts_ptr,
    sums_ptr,
    count,
    forced,
    keep,
    coverage,
    shift,
    FIRST: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_COVERAGE: tl.constexpr,
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block, r, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    base = 0
    above = 0
    mass_above = 0.0
    total = 0.0
    if not FIRST:
        base, above, mass_above, total = _narrow(
            old_state_ptr, old_counts_ptr, old_sums_ptr, r, shift + 6, keep, coverage, blocks, HAS_COVERAGE, BLOCKS
        )
    key, mass = _keys(mass_ptr, allowed_ptr, r, block * BLOCK + tl.arange(0, BLOCK), count, forced, HAS_ALLOWED, FORCED)
    place = (key - base) >> shift
    inside = (key >= base) & (key > 0) & (place < 64)
    bins = tl.arange(0, 64)
    at = (r * blocks + block) * 64
    tl.store(
        counts_ptr + at + bins,
        tl.histogram(tl.where(inside, place, 64), 128).reshape(2, 64).sum(0) - _outside(inside, bins),
    )
    if HAS_COVERAGE:
        for b in tl.static_range(64):
            tl.store(sums_ptr + at + b, tl.sum(tl.where(inside & (place == b), mass, 0.0), 0))
    if block == 0:
        tl.store(state_ptr + r * 4, base)
        tl.store(state_ptr + r * 4 + 1, above)
        if HAS_COVERAGE:
            tl.store(state_ptr + r * 4 + 2, mass_above.to(tl.int32, bitcast=True))  # type: ignore[attr-defined]
            tl.store(state_ptr + r * 4 + 3, total.to(tl.int32, bitcast=True))  # type: ignore[attr-defined]


@triton.jit
def _outside(inside, bins):
    """Entries that the 128-bin histogram put into bin 64, which folds onto bin 0."""
    return tl.where(bins == 0, tl.sum((~inside).to(tl.int32), 0), 0)


@triton.jit(do_not_specialize=["mass_ptr", "allowed_ptr", "count", "forced", "keep"])
def _keep(
    mass_ptr,
    allowed_ptr,
    state_ptr,
    counts_ptr,
    sums_ptr,
    kept_ptr,
    count,
    forced,
    keep,
    coverage,
    HAS_ALLOWED: tl.constexpr,
    HAS_COVERAGE: tl.constexpr,
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Everything above the threshold, and of those equal to it the first ones, up to the count."""
    block, r, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    threshold, above, _, _ = _narrow(
        state_ptr, counts_ptr, sums_ptr, r, 0, keep, coverage, blocks, HAS_COVERAGE, BLOCKS
    )
    base = tl.load(state_ptr + r * 4).to(tl.int32)
    at = block * BLOCK + tl.arange(0, BLOCK)
    key, _ = _keys(mass_ptr, allowed_ptr, r, at, count, forced, HAS_ALLOWED, FORCED)
    before = 0  # entries equal to the threshold in earlier blocks: the last pass's bins are single keys
    for offset in range(0, blocks, 1024):
        number = offset + tl.arange(0, 1024)
        equal = tl.load(counts_ptr + (r * blocks + number) * 64 + (threshold - base), mask=number < block, other=0)
        before += tl.sum(equal, 0)
    tie = ((key == threshold) & (key > 0)).to(tl.int32)
    rank = before + tl.cumsum(tie, 0) - tie
    kept = (key > threshold) | ((tie != 0) & ((rank < keep - above) | (key == FORCED)))
    tl.store(kept_ptr + r.to(tl.int64) * count + at, kept.to(tl.uint8), mask=at < count)


def top_budget(
    mass: torch.Tensor, keep: int, coverage: float | None, forced: int, allowed: torch.Tensor | None
) -> torch.Tensor:
    """As select.reference.top_budget, for masses up to 1."""
    mass = mass.contiguous()
    rows, count = mass.shape
    blocks, device = triton.cdiv(count, BLOCK), mass.device
    state = torch.empty(2, rows, 4, dtype=torch.int32, device=device)
    counts = torch.empty(2, rows, blocks, 64, dtype=torch.int32, device=device)
    sums = torch.empty_like(counts, dtype=torch.float32) if coverage is not None else counts
    mask = mass if allowed is None else allowed.view(torch.uint8)
    share = 0.0 if coverage is None else coverage
    flags = dict(
        HAS_ALLOWED=allowed is not None, HAS_COVERAGE=coverage is not None, FORCED=FORCED, BLOCK=BLOCK,
        BLOCKS=32,
    )  # fmt: skip
    for turn in range(PASSES):
        old, new = (turn + 1) % 2, turn % 2
        _search[(blocks, rows)](
            mass, mask, state[old], state[new], counts[old], sums[old], counts[new], sums[new], count, forced, keep,
            share, 6 * (PASSES - 1 - turn), FIRST=turn == 0, **flags, num_warps=4,
        )  # fmt: skip
    kept = torch.empty(rows, count, dtype=torch.uint8, device=device)
    last = (PASSES - 1) % 2
    _keep[(blocks, rows)](
        mass, mask, state[last], counts[last], sums[last], kept, count, forced, keep, share, **flags, num_warps=4
    )
    return kept.view(torch.bool)


@triton.jit(do_not_specialize=["mass_ptr", "number", "keep", "forced", "width"])
def _buckets(
    mass_ptr,
    index_ptr,
    count_ptr,
    number,
    keep,
    coverage,
    forced,
    width,
    HAS_COVERAGE: tl.constexpr,
    FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row whole in registers: bisection for the threshold, then the kept ones from the last to the first."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    live = at < number
    mass = tl.load(mass_ptr + row.to(tl.int64) * number + at, mask=live, other=0.0)
    high = tl.max(mass, 0)
    # Buckets sum several queries, so their masses pass 1; only their order matters.
    share = tl.div_rn(mass, tl.maximum(high, 1e-30))  # rounded right, so that the greatest is 1.0, a grade of its own
    key = tl.minimum(share.to(tl.int32, bitcast=True) >> DROPPED, FORCED - 1)
    key = tl.where(live, tl.where(at < forced, FORCED, key), 0)
    total = tl.sum(mass, 0)
    threshold = 0
    for turn in range(0, 12):
        tried = threshold | (1 << (11 - turn))
        enough = tl.sum((key >= tried).to(tl.int32), 0) >= keep
        if HAS_COVERAGE:
            enough = enough | (tl.sum(tl.where(key >= tried, mass, 0.0), 0) >= coverage * total)
        threshold = tl.where(enough, tried, threshold)
    above = tl.sum((key > threshold).to(tl.int32), 0)
    tie = ((key == threshold) & (key > 0)).to(tl.int32)
    rank = tl.cumsum(tie, 0) - tie
    kept = ((key > threshold) | ((tie != 0) & ((rank < keep - above) | (key == FORCED)))).to(tl.int32)
    held = tl.sum(kept, 0)
    slot = held - tl.cumsum(kept, 0)
    tl.store(index_ptr + row.to(tl.int64) * width + slot, at, mask=(kept != 0) & (slot < width))
    tl.store(count_ptr + row, tl.minimum(held, width))


def top_buckets(mass: torch.Tensor, keep: int, coverage: float | None, forced: int) -> Bands:
    """As select.reference.top_buckets."""
    rows, number = mass.shape
    width = min(max(keep, forced), number)
    index = torch.empty(rows, width, dtype=torch.int32, device=mass.device)
    count = torch.empty(rows, dtype=torch.int32, device=mass.device)
    block = next(n for n in BUCKETS if n >= number)
    _buckets[(rows,)](
        mass, index, count, number, keep, 0.0 if coverage is None else coverage, forced, width,
        HAS_COVERAGE=coverage is not None, FORCED=FORCED, BLOCK=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return Bands(index=index, count=count)
