"""GPU twin of estimate/reference.py in Triton: two passes over the keys, nothing of size queries x keys is stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.estimate.reference import FIXED_POINT
from mm_sglang.kernels.plan import BUCKET, device_ints, head_numbers
from mm_sglang.kernels.share import Team, gathered, part_of

ROWS = 64  # sampled queries of a block: one tensor-core tile
SPLIT, MOST_SPLITS = 2048, 256  # keys of a split, unless there would be more of them
TEAM_KEYS = 1 << 15  # with fewer, an estimate takes less than the two exchanges by which ranks share it out
LOG2E = 1.4426950408889634


# fmt: off
@triton.jit
def _load_keys(k_ptr, slots_ptr, kpos_ptr, kv, key, live, k_row, k_head, HAS_SLOTS: tl.constexpr,
               HAS_KPOS: tl.constexpr, D: tl.constexpr):
    """Keys as [D, n], and their positions."""
    dim = tl.arange(0, D)
    pos = tl.load(kpos_ptr + key, mask=live, other=0) if HAS_KPOS else key
    at = tl.load(slots_ptr + pos, mask=live, other=0) if HAS_SLOTS else pos
    k = tl.load(k_ptr + at[None, :].to(tl.int64) * k_row + kv * k_head + dim[:, None], mask=live[None, :], other=0.0)
    return k, pos


@triton.jit
def _load_queries(q_ptr, rows_ptr, head, block, count, q_row, q_head, D: tl.constexpr, ROWS: tl.constexpr):
    """Sampled queries as [ROWS, D], and their rows; -1 for none, and for all of a filler head."""
    at = block * ROWS + tl.arange(0, ROWS)
    rows = tl.load(rows_ptr + at, mask=at < tl.where(head >= 0, count, 0), other=-1)
    dim = tl.arange(0, D)
    where = tl.maximum(rows, 0)[:, None].to(tl.int64) * q_row + tl.maximum(head, 0) * q_head + dim[None, :]
    return tl.load(q_ptr + where, mask=(rows >= 0)[:, None], other=0.0), rows


@triton.jit
def _logits(q, k, rows, pos, live_key, prefix, factor):
    """Causally masked base-2 logits."""
    s = tl.dot(q, k, input_precision="ieee") * factor
    seen = (pos[None, :] <= (rows + prefix)[:, None]) & live_key[None, :] & (rows >= 0)[:, None]
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=["slots_ptr", "kpos_ptr", "rows_ptr", "count", "sampled", "prefix", "per_split",
                               "first"])
def _row_stats(q_ptr, k_ptr, slots_ptr, kpos_ptr, rows_ptr, heads_ptr, kv_ptr, stats_ptr, count, sampled, prefix,
               factor, q_row, q_head, k_row, k_head, g, per_split, first, HAS_SLOTS: tl.constexpr,
               HAS_KPOS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Running maximum and sum [split, 2, row] of every sampled query over one split of the keys, from split `first` on.

    Heads run fastest: they share keys.
    """
    member, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv = tl.load(kv_ptr + member // g)
    q, rows = _load_queries(q_ptr, rows_ptr, tl.load(heads_ptr + member), block, count, q_row, q_head, D, ROWS)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for offset in range(0, per_split, BLOCK):
        key = (first + split) * per_split + offset + tl.arange(0, BLOCK)
        k, pos = _load_keys(k_ptr, slots_ptr, kpos_ptr, kv, key, key < sampled, k_row, k_head, HAS_SLOTS, HAS_KPOS, D)
        s = _logits(q, k, rows, pos, key < sampled, prefix, factor)
        new = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(s - new[:, None]), 1)
        top = new
    number = tl.num_programs(0) * tl.num_programs(1) * ROWS
    out = split * 2 * number + (member * tl.num_programs(1) + block) * ROWS + tl.arange(0, ROWS)
    tl.store(stats_ptr + out, top)
    tl.store(stats_ptr + number + out, total)


@triton.jit(do_not_specialize=["splits"])
def _combine(stats_ptr, lse_ptr, splits, SPLITS: tl.constexpr):
    """Base-2 log-sum-exp of one row over its splits; +inf for a row that saw nothing, so that its weights are 0."""
    row, number = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, SPLITS)
    top = tl.load(stats_ptr + at * 2 * number + row, mask=at < splits, other=-1e30)
    total = tl.load(stats_ptr + (at * 2 + 1) * number + row, mask=at < splits, other=0.0)
    high = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - high), 0)
    tl.store(lse_ptr + row, tl.where(total > 0, high + tl.log2(tl.maximum(total, 1e-38)), float("inf")))


@triton.jit(do_not_specialize=["slots_ptr", "kpos_ptr", "rows_ptr", "count", "sampled", "prefix", "blocks", "number",
                               "shift", "first", "base_key", "width"])
def _mass(q_ptr, k_ptr, slots_ptr, kpos_ptr, rows_ptr, heads_ptr, kv_ptr, lse_ptr, columns_ptr, buckets_ptr, count,
          sampled, prefix, factor, share, q_row, q_head, k_row, k_head, g, blocks, number, shift, first, base_key,
          width, HAS_SLOTS: tl.constexpr, HAS_KPOS: tl.constexpr, ALIGNED: tl.constexpr, D: tl.constexpr,
          ROWS: tl.constexpr, BLOCK: tl.constexpr, BUCKET: tl.constexpr, FIXED_POINT: tl.constexpr):
    """Column sums of one block of keys over all heads and queries of a KV head; a few atomics a tile for buckets.

    Keys run down the tile and queries across, so that sums over queries stay inside a warp. Blocks count from `first`;
    columns [R, width] hold keys from `base_key` on. Buckets are whole numbers: atomics add in any order.
    """
    r = tl.program_id(1)
    kv = tl.load(kv_ptr + r)
    own = (first + tl.program_id(0)) * BLOCK
    key = own - shift + tl.arange(0, BLOCK)
    live_key = (key >= 0) & (key < sampled)
    k, pos = _load_keys(k_ptr, slots_ptr, kpos_ptr, kv, key, live_key, k_row, k_head, HAS_SLOTS, HAS_KPOS, D)
    k = tl.trans(k)
    column = tl.zeros([BLOCK], tl.float32)
    real = 0
    lane = tl.arange(0, BLOCK)
    for turn in range(0, g * blocks):
        i = turn // blocks
        block = turn % blocks
        head = tl.load(heads_ptr + r * g + i)
        real += ((head >= 0) & (block == 0)).to(tl.int32)
        q, rows = _load_queries(q_ptr, rows_ptr, head, block, count, q_row, q_head, D, ROWS)
        lse = tl.load(lse_ptr + ((r * g + i) * blocks + block) * ROWS + tl.arange(0, ROWS))
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * factor - lse[None, :]
        seen = (pos[:, None] <= (rows + prefix)[None, :]) & live_key[:, None] & (rows >= 0)[None, :]
        p = tl.exp2(tl.where(seen, s, float("-inf")))
        whole = tl.sum(p, 1)
        column += whole
        base = (r * g + i) * number
        if ALIGNED:
            # Rows are consecutive positions and (row 0 - key 0) is a multiple of BUCKET, so key j of a run of BUCKET
            # is in that bucket for rows i >= j and in the next nearer one for the others.
            upper = tl.sum(tl.where(tl.arange(0, ROWS)[None, :] >= (lane % BUCKET)[:, None], p, 0.0), 1)
            top = (tl.load(rows_ptr + block * ROWS) + prefix - own + shift) // BUCKET
            near = tl.sum(tl.reshape(upper, [BLOCK // BUCKET, BUCKET]), 1)
            far = tl.sum(tl.reshape(whole - upper, [BLOCK // BUCKET, BUCKET]), 1)
            bucket = base + top - tl.arange(0, BLOCK // BUCKET)
            tl.atomic_add(buckets_ptr + bucket, (near * FIXED_POINT).to(tl.int64), mask=near > 0)
            tl.atomic_add(buckets_ptr + bucket - 1, (far * FIXED_POINT).to(tl.int64), mask=far > 0)
        elif not HAS_KPOS:  # all keys, from rows anywhere: whichever buckets the tile runs through
            at = rows + prefix
            distance = at[None, :] - pos[:, None]
            bucket = tl.where(distance >= 0, distance // BUCKET, -1)
            first = tl.min(tl.where(rows >= 0, at, 2147483647), 0) - tl.max(tl.where(live_key, pos, 0), 0)
            last = tl.max(tl.where(rows >= 0, at, -1), 0) - own
            low = tl.maximum(first, 0) // BUCKET
            high = tl.where(last >= 0, last // BUCKET + 1, 0)
            for b in range(low, high):
                held = tl.sum(tl.sum(tl.where(bucket == b, p, 0.0), 1), 0)
                tl.atomic_add(buckets_ptr + base + b, (held * FIXED_POINT).to(tl.int64), mask=held > 0)
    out = columns_ptr + r.to(tl.int64) * width + key - base_key
    tl.store(out, column * share / tl.maximum(real, 1), mask=live_key)
# fmt: on


def _row_lse(
    q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None, heads: tuple[tuple[int, ...], ...],
    kv_head: tuple[int, ...], rows: torch.Tensor, prefix: int, sampled: int, k_pos: torch.Tensor | None, scale: float,
    team: Team | None,
) -> torch.Tensor:  # fmt: skip
    """Base-2 log-sum-exp [G * blocks * ROWS] of each sampled query over the sampled keys; +inf where it sees none."""
    device, g, count = q.device, len(heads[0]), len(rows)
    members, blocks = len(heads) * g, max(1, -(-count // ROWS))
    block = _block(q)
    splits = min(MOST_SPLITS, max(1, -(-sampled // SPLIT)))
    per_split = -(-sampled // splits)
    per_split = -(-per_split // block) * block
    first, number = part_of(team, splits)
    stats = torch.empty(number, 2 * members * blocks * ROWS, device=device)
    lse = torch.empty(members * blocks * ROWS, device=device)
    _row_stats[(members, blocks, number)](
        q, k, q if slots is None else slots, q if k_pos is None else k_pos, rows, head_numbers(heads, device),
        device_ints(kv_head, device), stats, count, sampled, prefix, scale * LOG2E, q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), g, per_split, first, HAS_SLOTS=slots is not None, HAS_KPOS=k_pos is not None,
        D=q.shape[2], ROWS=ROWS, BLOCK=block, num_warps=4,
    )  # fmt: skip
    _combine[(len(lse),)](gathered(team, stats), lse, splits, SPLITS=MOST_SPLITS, num_warps=1)
    return lse


def _block(q: torch.Tensor) -> int:
    return 128 if q.element_size() == 2 else 64


def row_lse(
    q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor | None, rows: torch.Tensor, prefix: int, scale: float
) -> torch.Tensor:
    """As estimate.reference.row_lse."""
    share, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    heads = tuple(tuple(range(j * share, (j + 1) * share)) for j in range(kv_heads))
    lse = _row_lse(q, k, slots, heads, tuple(range(kv_heads)), rows, prefix, prefix + len(q), None, scale, None)
    out = lse.view(q.shape[1], -1)[:, : len(rows)] / LOG2E
    return torch.where(out == float("inf"), float("-inf"), out)


def sampled_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor | None,
    heads: tuple[tuple[int, ...], ...],
    kv_head: tuple[int, ...],
    rows: torch.Tensor,
    prefix: int,
    keys: int,
    k_pos: torch.Tensor | None,
    scale: float,
    last_row: int | None,
    team: Team | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As estimate.reference.sampled_mass; buckets stay zero with k_pos, where nobody asks for them."""
    device, g, count = q.device, len(heads[0]), len(rows)
    sampled = keys if k_pos is None else len(k_pos)
    if k_pos is not None or sampled < TEAM_KEYS:
        team = None
    members, blocks, block = len(heads) * g, max(1, -(-count // ROWS)), _block(q)
    lse = _row_lse(q, k, slots, heads, kv_head, rows, prefix, sampled, k_pos, scale, team)
    # A run of consecutive rows: key blocks are shifted so that every one starts a bucket away from row 0.
    aligned = k_pos is None and last_row is not None
    shift = -(prefix + last_row - count + 1) % BUCKET if aligned and last_row is not None else 0
    first, here = part_of(team, -(-(sampled + shift) // block))
    base_key, width = (0, sampled) if team is None else (first * block - shift, here * block)
    number = -(-keys // BUCKET)
    # One buffer, hence one exchange; columns start at a multiple of 16 bytes, as compiled kernels like it.
    words, floats = -(-members * number // 2) * 2, len(heads) * width
    room = torch.zeros(1, words + -(-floats // 2), dtype=torch.int64, device=device)
    buckets, columns = room[0, :words], room[0, words:].view(torch.float32)
    _mass[(here, len(heads))](
        q, k, q if slots is None else slots, q if k_pos is None else k_pos, rows, head_numbers(heads, device),
        device_ints(kv_head, device), lse, columns, buckets, count, sampled, prefix, scale * LOG2E,
        1.0 / max(1, count), q.stride(0), q.stride(1), k.stride(0), k.stride(1), g, blocks, number, shift, first,
        base_key, width, HAS_SLOTS=slots is not None, HAS_KPOS=k_pos is not None, ALIGNED=aligned, D=q.shape[2],
        ROWS=ROWS, BLOCK=block, BUCKET=BUCKET, FIXED_POINT=FIXED_POINT, num_warps=4,
    )  # fmt: skip
    rooms = gathered(team, room)
    buckets = rooms[:, : members * number].sum(0).view(members, number)
    columns = rooms[:, words:].view(torch.float32)[:, :floats].view(-1, len(heads), width).transpose(0, 1).flatten(1)
    begin = 0 if team is None else shift
    return columns[:, begin : begin + sampled], buckets.float() / FIXED_POINT
