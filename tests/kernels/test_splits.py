"""Lists in parts: together the same tiles, and results that merge into the softmax over all of them."""

from __future__ import annotations

import pytest
import torch

from mm_sglang.kernels.attend.splits import LEAST_TILES, PROCESSORS, merged, parts_for, split
from mm_sglang.kernels.plan import TileLists


def lists(heads: int, tiles: int, width: int, short: int) -> TileLists:
    """Of queries at the end of the keys: all tiles but the last `short`, of which one is partial."""
    every = torch.arange(width, dtype=torch.int32).expand(heads, tiles, width)
    count = torch.full((heads, tiles), width - short, dtype=torch.int32)
    return TileLists(
        first=0, full_count=count, full_index=every.contiguous(), partial_count=torch.full_like(count, min(short, 1)),
        partial_index=(every + width - short).contiguous(),
    )  # fmt: skip


@pytest.mark.parametrize(
    "heads, key_tiles", [(7, 8192), (28, 8193), (1, 200), (132, 9000), (200, 9000), (5, 64), (5, 1)]
)
def test_parts_fill_the_processors_and_are_never_empty(heads: int, key_tiles: int) -> None:
    parts = parts_for(heads, key_tiles)
    assert parts >= 1 and (parts == 1 or parts * heads <= PROCESSORS and key_tiles // parts >= LEAST_TILES)
    assert (parts + 1) * heads > PROCESSORS or key_tiles // (parts + 1) < LEAST_TILES  # no more would fit
    made = split(lists(2, 1, key_tiles, min(2, key_tiles)), parts)
    assert (made.full_count + made.partial_count).min() > 0


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("short", [0, 1, 2])
def test_parts_hold_each_tile_once(parts: int, short: int) -> None:
    given = lists(3, 2, 50, short)
    made = split(given, parts)
    assert made.full_index.is_contiguous() and made.full_count.dtype == torch.int32
    for head in range(3):
        for tile in range(2):
            own = [part * 2 + tile for part in range(parts)]
            full = [made.full_index[head, m, : made.full_count[head, m]] for m in own]
            assert torch.equal(torch.cat(full), torch.arange(50 - short, dtype=torch.int32))
            assert made.partial_count[head, own].tolist() == [0] * (parts - 1) + [min(short, 1)]
            last = made.partial_index[head, own[-1], : made.partial_count[head, own[-1]]]
            assert torch.equal(last, given.partial_index[head, tile, : min(short, 1)])


@pytest.mark.parametrize("parts", [2, 5])
def test_merged_is_the_softmax_over_all_keys(parts: int) -> None:
    orders, rows, g, dim, keys = 2, 6, 3, 8, 40
    q, k, v = torch.randn(orders, rows, g, dim), torch.randn(orders, keys, dim), torch.randn(orders, keys, dim)
    logits = torch.einsum("rngd,rkd->rgnk", q * 3, k)
    out, lse = [], []
    for own, values in zip(logits.tensor_split(parts, 3), v.tensor_split(parts, 1), strict=True):
        out.append(torch.einsum("rgnk,rkd->rngd", own.softmax(3), values))
        lse.append(own.logsumexp(3))
    got, total = merged(torch.cat(out, 1), torch.cat(lse, 2), parts)
    torch.testing.assert_close(got, torch.einsum("rgnk,rkd->rngd", logits.softmax(3), v))
    torch.testing.assert_close(total, logits.logsumexp(3))
