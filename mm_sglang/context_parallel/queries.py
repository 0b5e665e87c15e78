"""Which queries have to travel: those of other ranks that a recipe reads to plan, or gathers into tiles of its own.

Legend: H heads, T rows of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mm_sglang.batches import SparseChunk
from mm_sglang.kernels import classes
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.patterns.base import Looked

EVERY: Looked = ((None, None),)
Needed = tuple[Looked, ...]  # of each chunk


def pieces(
    recipes: Sequence[Sequence[HeadPattern]], chunks: Sequence[SparseChunk], lengths: Sequence[int], tail: int
) -> list[tuple[tuple[int, ...], Needed]]:
    """(heads, what is needed of them): by how much that is, so that one head's all is not sent of every head.

    Args:
        recipes: [chunks][H]; lengths: rows of each chunk; tail: of `sparse_prefill`, whose tile any rank may run.
    """
    looked = []
    for own, chunk, rows in zip(recipes, chunks, lengths, strict=True):
        last = (None, classes.tail(chunk.layout, rows, tail))
        known = {p: together([*p.looks_at(chunk.layout, rows), last]) for p in set(own)}
        looked.append([known[p] for p in own])
    by_head: list[Needed] = list(zip(*looked, strict=True))
    out = []
    for size in range(3):
        heads = tuple(head for head, needed in enumerate(by_head) if _size(needed) == size)
        needed = tuple(together(one for head in heads for one in by_head[head][c]) for c in range(len(chunks)))
        if any(needed):
            out.append((heads, needed))
    return out


def together(looked: Iterable[tuple[str | None, int | None]]) -> Looked:
    """The same rows and no others, each class once."""
    most: dict[str | None, int | None] = {}
    for name, number in looked:
        held = most.get(name, 0)
        most[name] = None if number is None or held is None else max(number, held)
    if None in most and most[None] is None:
        return EVERY
    return tuple(sorted(((name, n) for name, n in most.items() if n != 0), key=str))


def _size(needed: Needed) -> int:
    """0: some last rows; 1: all of a class; 2: all."""
    if EVERY in needed:
        return 2
    return int(any(number is None for looked in needed for _, number in looked))


def wanted(needed: Needed, chunks: Sequence[SparseChunk], lengths: Sequence[int]) -> torch.Tensor:
    """bool [T] on the host."""
    parts = [_rows(chunk.layout, n, own) for chunk, n, own in zip(chunks, lengths, needed, strict=True)]
    return torch.cat(parts)


def _rows(layout: TokenLayout, queries: int, looked: Looked) -> torch.Tensor:
    first, out = layout.length - queries, torch.zeros(queries, dtype=torch.bool)
    for name, number in looked:
        at = torch.arange(queries)
        if name is not None:
            at = classes.on_host(layout, name, first, layout.length).long() - first
        out[at if number is None else at[max(0, len(at) - number) :]] = True
    return out
