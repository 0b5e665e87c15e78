"""Engine "fa4": FlashAttention-4's block-sparse forward (flash_attn.cute, 4.0.0b36) on SM90, 128 x 128 tiles.

A group's orders are FA4's batch, its heads FA4's heads, and each order is its own KV head. What is already in the
right order is passed as a view; what is not is copied in pieces that fit WORKSPACE, which is all the memory it takes.

Rules that shape this file (measured, see benchmarks/results): SM90 needs both lists; mask_mod runs on the partial list
only; with mask_mod the scheduler takes query tiles in grid order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_fwd

from mm_sglang.kernels.attend.fa4_masks import MASKS
from mm_sglang.kernels.attend.splits import merged, parts_for, split
from mm_sglang.kernels.patterns.dense import TextTail
from mm_sglang.kernels.permute.rows import gather_keys, gather_queries, scatter_queries
from mm_sglang.kernels.plan import TILE, HeadGroup
from mm_sglang.kernels.stages import stage

WORKSPACE = 1 << 30  # bytes of copied keys and values at once, and at most a quarter of that of copied queries


@dataclass(frozen=True, kw_only=True)
class Progression:
    """Numbers first + r * step + i * inner for r < R, i < g: what a strided view can address."""

    first: int
    step: int
    inner: int

    @classmethod
    def of(cls, table: tuple[tuple[int, ...], ...]) -> Progression | None:
        """The progression that `table` [R][g] is, or None."""
        first = table[0][0]
        step = table[1][0] - first if len(table) > 1 else 1  # FA4 refuses strides of 0, also where nothing is strode
        inner = table[0][1] - first if len(table[0]) > 1 else 1
        ok = step > 0 and inner > 0 and first >= 0
        if ok and all(n == first + r * step + i * inner for r, row in enumerate(table) for i, n in enumerate(row)):
            return cls(first=first, step=step, inner=inner)
        return None


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
    """As attend.reference.attend; bf16 or fp16, head_dim 64 or 128, on an SM90 device."""
    copied = group.k_order is not None or slots is not None or Progression.of((group.kv_head,)) is None
    bytes_a_row = 2 * group.key_tiles * TILE * k.shape[2] * k.element_size()
    step = max(1, WORKSPACE // bytes_a_row) if copied else len(group.kv_head)
    for first in range(0, len(group.kv_head), step):
        part = group.rows(first, min(first + step, len(group.kv_head)))
        if copied:
            with stage("permute"):
                keys, values = gather_keys(k, v, slots, part.k_order, part.kv_head, part.keys)
        else:
            keys, values = (_key_view(x, part.kv_head) for x in (k, v))
        _attend_part(q, keys[:, :, None], values[:, :, None], part, scale, out, lse)


def _key_view(x: torch.Tensor, kv_head: tuple[int, ...]) -> torch.Tensor:
    """[R, Nk, D] of x [Nk, Hkv, D] without a copy; kv_head is a progression."""
    step = kv_head[1] - kv_head[0] if len(kv_head) > 1 else 1
    return x[:, kv_head[0] : kv_head[-1] + 1 : step].transpose(0, 1)


def _attend_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: HeadGroup, scale: float, out: torch.Tensor,
    lse: torch.Tensor,
) -> None:  # fmt: skip
    """k, v: [R, slots, 1, D] in the group's key order."""
    # By heads alone: under context parallelism a rank has some of the group's query tiles, and bits must not differ.
    tail = isinstance(group.pattern, TextTail)
    parts = parts_for(len(group.heads) * len(group.heads[0]), group.key_tiles) if tail else 1
    heads = Progression.of(group.heads) if group.q_order is None else None
    orders, g = len(group.heads), len(group.heads[0])
    for first, last in _slices(group, q, heads is None):
        start = first * TILE
        rows = last * TILE - start if heads is None else min(last * TILE, group.queries) - start
        if heads is not None:
            query, result = (_query_view(x, heads, orders, g, start, rows) for x in (q, out))
            log = lse.as_strided(
                (orders, g, rows), (heads.step * lse.stride(0), heads.inner * lse.stride(0), 1),
                lse.storage_offset() + heads.first * lse.stride(0) + start,
            )  # fmt: skip
        else:
            with stage("permute"):
                query = gather_queries(q, group.q_order, group.heads, group.prefix, start, rows)
                query = query.repeat(1, parts, 1, 1) if parts > 1 else query
            result = torch.empty_like(query)
            log = torch.empty(orders, g, parts * rows, device=q.device)
        if group.everything and heads is not None:  # whole queries in order: FA4's dense kernel and its scheduler
            with stage("attend"):
                _flash_attn_fwd(query, k, v, softmax_scale=scale, causal=True, out=result, lse=log)
            continue
        lists, limits = group.lists(first, last), group.limits[:, :, start : last * TILE]
        if parts > 1:
            lists, limits = split(lists, parts), limits.repeat(1, 1, parts)
        shape = (orders, g, parts * (last - first))
        tiles = BlockSparseTensorsTorch(
            mask_block_cnt=lists.partial_count.view(shape), mask_block_idx=lists.partial_index.view(*shape, -1),
            full_block_cnt=lists.full_count.view(shape), full_block_idx=lists.full_index.view(*shape, -1),
            block_size=(TILE, TILE),
        )  # fmt: skip
        with stage("attend"):
            _flash_attn_fwd(
                query, k, v, softmax_scale=scale, causal=False, mask_mod=MASKS[len(group.segments)],
                block_sparse_tensors=tiles, out=result, lse=log, pack_gqa=False,
                aux_tensors=[limits, group.start],
            )  # fmt: skip
        if heads is None:
            with stage("merge"):
                if parts > 1:
                    result, log = merged(result, log, parts)
                scatter_queries(result, log, group.q_order, group.heads, group.prefix, start, out, lse)


def _slices(group: HeadGroup, q: torch.Tensor, copied: bool) -> list[tuple[int, int]]:
    """The group's slices, cut further so that copies of queries and outputs fit; whole if FA4 needs no lists."""
    if group.everything and not copied:
        return [(0, group.query_tiles)]
    if not copied:
        return list(group.slices())
    heads = len(group.heads) * len(group.heads[0])
    step = max(1, WORKSPACE // 4 // (2 * heads * TILE * q.shape[2] * q.element_size()))
    return [(a, min(a + step, last)) for first, last in group.slices() for a in range(first, last, step)]


def _query_view(x: torch.Tensor, heads: Progression, orders: int, g: int, start: int, rows: int) -> torch.Tensor:
    """[R, rows, g, D] of x [Nq, H, D] from row `start`, without a copy."""
    row, head = x.stride(0), x.stride(1)
    return x.as_strided(
        (orders, rows, g, x.shape[2]), (heads.step * head, row, heads.inner * head, 1),
        x.storage_offset() + heads.first * head + start * row,
    )  # fmt: skip
