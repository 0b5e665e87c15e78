"""GPU twin of merge/residual_reference.py in Triton: one pass over the tile means, merged where it is computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mm_sglang.kernels.estimate.blocks_gpu import pool
from mm_sglang.kernels.plan import PAD, TILE, HeadGroup, head_numbers

TABLE_BYTES = 128 << 20  # of the table of listed tiles at once
LOG2E = 1.4426950408889634


# fmt: off
@triton.jit(do_not_specialize=["width", "tiles"])
def _mark(count_ptr, index_ptr, table_ptr, width, tiles, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    for offset in range(0, count, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        n = tl.load(index_ptr + row * width + at, mask=at < count, other=0)
        tl.store(table_ptr + row * tiles + n, tl.full([BLOCK], 1, tl.uint8), mask=at < count)


@triton.jit(do_not_specialize=["start_ptr", "first", "prefix", "queries", "q_rows", "tiles", "lse_head"])
def _residual(q_ptr, k_ptr, v_ptr, number_ptr, table_ptr, limits_ptr, start_ptr, order_ptr, heads_ptr, out_ptr, lse_ptr,
              first, prefix, queries, q_rows, tiles, g, segments, factor, q_row, q_head, out_row, out_head, lse_head,
              HAS_ORDER: tl.constexpr, PAD: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    m, member = tl.program_id(0), tl.program_id(1)
    r = member // g
    head = tl.load(heads_ptr + member)
    if head >= 0:
        at = (first + m) * TILE + tl.arange(0, TILE)
        if HAS_ORDER:
            position = tl.load(order_ptr + r.to(tl.int64) * q_rows + at)
            live = position != PAD
        else:
            position = at + prefix
            live = at < queries
        row = tl.where(live, position - prefix, 0).to(tl.int64)
        dim = tl.arange(0, D)
        q = tl.load(q_ptr + row[:, None] * q_row + head * q_head + dim[None, :], mask=live[:, None], other=0.0)
        acc = tl.zeros([TILE, D], tl.float32)
        top = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        entry = (member.to(tl.int64) * tl.num_programs(0) + m) * tiles
        for s in range(0, segments):
            limit = tl.load(limits_ptr + (r * segments + s).to(tl.int64) * q_rows + at)
            low = tl.min(tl.where(limit < 0, 2147483647, limit), 0)
            begin = tl.load(start_ptr + r * (segments + 1) + s) // TILE
            stop = tl.load(start_ptr + r * (segments + 1) + s + 1)
            end = (tl.minimum(low, stop) + TILE - 1) // TILE
            for offset in range(begin, end, BLOCK):
                n = offset + tl.arange(0, BLOCK)
                inside = n < end
                number = tl.load(number_ptr + r * tiles + n, mask=inside, other=0)
                listed = tl.load(table_ptr + entry + n, mask=inside, other=1)
                # a tile's keys fill it from the front
                missing = (listed == 0) & (number > 0) & (n * TILE + number <= low)
                mean = (r.to(tl.int64) * tiles + n) * D
                k = tl.load(k_ptr + mean[None, :] + dim[:, None], mask=inside[None, :], other=0.0)
                v = tl.load(v_ptr + mean[:, None] + dim[None, :], mask=inside[:, None], other=0.0)
                bias = tl.where(missing, tl.log2(tl.maximum(number, 1).to(tl.float32)), float("-inf"))
                logits = tl.dot(q, k, input_precision="ieee") * factor + bias[None, :]
                new = tl.maximum(top, tl.max(logits, 1))
                safe = tl.where(new == float("-inf"), 0.0, new)
                p = tl.exp2(logits - safe[:, None])
                shrink = tl.exp2(top - safe)
                total = total * shrink + tl.sum(p, 1)
                acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
                top = new
        mine = lse_ptr + head.to(tl.int64) * lse_head + row
        old = tl.load(mine, mask=live, other=float("-inf")) * 1.4426950408889634  # base 2
        new = tl.maximum(old, top)
        safe = tl.where(new == float("-inf"), 0.0, new)
        keep, add = tl.exp2(old - safe), tl.exp2(top - safe)
        both = keep + add * total
        out = out_ptr + row[:, None] * out_row + head * out_head + dim[None, :]
        result = tl.load(out, mask=live[:, None], other=0.0).to(tl.float32) * keep[:, None] + acc * add[:, None]
        tl.store(out, result / tl.where(both > 0, both, 1.0)[:, None], mask=live[:, None])
        tl.store(mine, (safe + tl.log2(both)) * 0.6931471805599453, mask=live)
# fmt: on


def residual(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor | None,
    group: HeadGroup,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """As merge.residual_reference.residual."""
    device, kv, tiles = q.device, tuple((head,) for head in group.kv_head), group.key_tiles
    members, order = len(group.heads) * len(group.heads[0]), group.q_order
    k_mean, v_mean = (pool(x, group.k_order, slots, kv, 1, False, 0, group.keys) for x in (k, v))
    number = (group.k_positions().view(len(kv), tiles, TILE) != PAD).sum(2, dtype=torch.int32)
    heads = head_numbers(group.heads, device)
    step = max(1, TABLE_BYTES // (members * tiles))
    ranges = [(a, min(a + step, last)) for first, last in group.slices() for a in range(first, last, step)]
    for first, last in ranges:
        lists = group.lists(first, last)
        table = torch.zeros(members, last - first, tiles, dtype=torch.uint8, device=device)
        for count, index in (
            (lists.full_count, lists.full_index),
            (lists.partial_count, lists.partial_index),
        ):
            _mark[(count.numel(),)](count, index, table, index.shape[2], tiles, BLOCK=128, num_warps=1)
        _residual[(last - first, members)](
            q, k_mean, v_mean, number, table, group.limits, group.start, q if order is None else order, heads, out, lse,
            first, group.prefix, group.queries, group.query_tiles * TILE, tiles, len(group.heads[0]),
            len(group.segments), scale * LOG2E, q.stride(0), q.stride(1), out.stride(0), out.stride(1), lse.stride(0),
            HAS_ORDER=order is not None, PAD=PAD, TILE=TILE, D=q.shape[2], BLOCK=64, num_warps=8,
            num_stages=2 if q.element_size() == 2 else 1,
        )  # fmt: skip
