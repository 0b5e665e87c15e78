"""Who owns which rows: every row once, whole tiles, and the balance that the choice of stripes rests on."""

from __future__ import annotations

import pytest
import torch

from mm_sglang.kernels.plan import TILE
from mm_sglang.parallel.sharding import KINDS, Sharding, balance, block_owners, turns

SIZES = (1, 2, 4, 8)


@pytest.mark.parametrize("lengths", [(1,), (128,), (1000,), (77, 1, 2049, 300), (16384,)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_every_row_has_one_owner_and_comes_back(size: int, kind: str, lengths: tuple[int, ...]) -> None:
    sharding = Sharding(lengths=lengths, size=size, kind=kind)
    rows = [sharding.rows(rank) for rank in range(size)]
    assert sorted(torch.cat(rows).tolist()) == list(range(sum(lengths)))
    assert [len(own) for own in rows] == list(sharding.counts)
    assert all((own.diff() > 0).all() for own in rows)

    width = max(sharding.counts) + 3  # SGLang fills up to a multiple of its own
    x = torch.arange(sum(lengths))
    parts = torch.full((size, width), -1)
    for rank, own in enumerate(rows):
        parts[rank, : len(own)] = x[own]
    assert torch.equal(parts.flatten()[sharding.inverse(width)], x)
    order = sharding.gathered(width)
    filled = order < sum(lengths)
    assert torch.equal(parts.flatten()[filled], order[filled]) and (parts.flatten()[~filled] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_tile_is_one_ranks(size: int, kind: str) -> None:
    lengths = (700, 5, 1300)
    sharding, start = Sharding(lengths=lengths, size=size, kind=kind), 0
    for chunk, length in enumerate(lengths):
        tiles = [sharding.tiles(chunk, rank) for rank in range(size)]
        assert sorted(sum(tiles, ())) == list(range(-(-length // TILE)))
        for rank, own in enumerate(tiles):
            for tile in own:
                rows = sharding.row_owner[start + tile * TILE : start + min((tile + 1) * TILE, length)]
                assert (rows == rank).all()
        start += length


def test_the_orders_themselves() -> None:
    assert block_owners(6, 4, "stripe").tolist() == [0, 1, 2, 3, 0, 1]
    assert block_owners(8, 2, "zigzag").tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert Sharding(lengths=(130, 1, 200), size=4, kind="stripe").owners[2].tolist() == [3, 0]
    assert [turns(5, rank, 2) for rank in range(2)] == [(0, 2, 4), (1, 3, 4)]
    assert turns(1, 7, 8) == (0,)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_balance_of_causal_tiles_and_of_a_dense_tail(size: int) -> None:
    """256 blocks after a long prefix and none; and a sparse chunk whose last 3% of rows, the question, is dense."""
    blocks = 256
    causal = torch.arange(1, blocks + 1)
    sparse = torch.full((blocks,), 20.0)
    sparse[-8:] = causal[-8:].float()
    found = {
        kind: [balance(c, block_owners(blocks, size, kind), size) for c in (causal, causal + 4096, sparse)]
        for kind in KINDS
    }
    assert max(found["stripe"]) < 1.03
    assert max(found["zigzag"][:2]) < 1.001
    assert found["zigzag"][2] > 1.2  # one rank has the whole tail


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='ring': needs one of"):
        block_owners(3, 2, "ring")
    with pytest.raises(ValueError, match="size=0: needs at least one rank"):
        block_owners(3, 0, "stripe")
    with pytest.raises(ValueError, match="width=100: rank 0 has 128 rows"):
        Sharding(lengths=(200,), size=2, kind="stripe").gathered(100)
