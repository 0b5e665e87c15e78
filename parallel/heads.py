"""Which query heads a tensor-parallel rank computes. Pure functions."""

from __future__ import annotations


def local_heads(total: int, rank: int, size: int) -> range:
    """Global numbers of the query heads of tensor-parallel rank `rank` of `size` (SGLang: contiguous, equal shares).

    KV heads fewer than ranks are replicated; the query heads of one rank then all read its one KV head, so the local
    grouping `head // (query heads / KV heads)` stays true on every rank.

    Raises:
        ValueError: heads that don't divide, or a rank out of range.
    """
    if size < 1 or total % size:
        raise ValueError(f"{total} query heads over {size} ranks: needs a rank count that divides them")
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}: needs 0..{size - 1}")
    share = total // size
    return range(rank * share, (rank + 1) * share)
