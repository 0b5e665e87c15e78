"""A plan run tile by tile in shares gives what it gives whole, on every engine."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported

from recipes import ITEMS, RECIPES, relative_error

from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import head_pattern
from mm_sglang.kernels.plan import TILE, HeadGroup
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.kernels.share import some_tiles
from mm_sglang.parallel.sharding import block_owners, blocks_of, turns

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE, HEADS, PREFIX, QUERIES = 0.3, 4, 256, 355
SOME = ("dense", "grid_frame", "block_topk", "2d_mixed")


def parts(group: HeadGroup, size: int) -> list[HeadGroup]:
    """A group's shares, one a rank: its own tiles, or turns where queries are gathered."""
    owners = block_owners(blocks_of(QUERIES), size, "stripe")
    out = []
    for rank in range(size):
        tiles = torch.where(owners == rank)[0].tolist()
        tiles = list(turns(group.query_tiles, rank, size)) if group.q_order is not None else tiles
        if tiles:
            out.append(some_tiles(group, torch.tensor(tiles, device=DEVICE).expand(len(group.kv_head), -1)))
    return out


@pytest.mark.parametrize("name", ["reference", "triton", pytest.param("fa4", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("recipe", SOME)
def test_shares_put_together_are_the_whole(recipe: str, name: str) -> None:
    chosen, half = engine(name), name == "fa4"
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(rows, heads, 64 if half else 16, generator=generator).to(DEVICE, torch.float16 if half else None)
        for rows, heads in ((QUERIES, HEADS), (PREFIX + QUERIES, 2), (PREFIX + QUERIES, 2))
    )
    layout = TokenLayout(items=ITEMS, length=PREFIX + QUERIES, device=DEVICE)
    settings: dict[str, Any] = RECIPES[recipe] | {"residual": recipe == "block_topk"}
    patterns = [head_pattern(settings)] * HEADS
    whole, _, plan = sparse_prefill(q, k, v, layout=layout, patterns=patterns, scale=SCALE, engine=chosen)
    for size in (4,) if name == "triton" else (2, 4):
        out = torch.full_like(whole, torch.nan)
        lse = torch.empty(HEADS, QUERIES, device=DEVICE)
        for group in plan.groups:
            for part in parts(group, size):
                chosen.attend(q, k, v, None, part, SCALE, out, lse)
                if group.pattern.residual:
                    chosen.ops().residual(q, k, v, None, part, SCALE, out, lse)
        if half:  # whole dense groups are FA4's own dense kernel, which sums in another order
            assert relative_error(out, whole.double()) < 2 * torch.finfo(torch.float16).eps
        else:
            assert torch.equal(out, whole)


def test_a_picked_tile_keeps_its_rows_and_lists() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k = torch.randn(QUERIES, 2, 16, generator=generator), torch.randn(QUERIES, 2, 16, generator=generator)
    layout = TokenLayout(items=ITEMS, length=QUERIES)
    patterns = [head_pattern(RECIPES["vertical_slash"])] * 2
    (group,) = sparse_prefill(
        q, k, k, layout=layout, patterns=patterns, scale=SCALE, engine=engine("reference")
    )[2].groups  # fmt: skip
    part, lists = some_tiles(group, torch.tensor([[2, 0], [1, 1]])), group.lists()
    assert part.q_positions()[0, :TILE].tolist() == group.q_positions()[0, 2 * TILE :].tolist()
    assert part.lists().full_count.tolist() == [
        lists.full_count[0, [2, 0]].tolist(),
        lists.full_count[1, [1, 1]].tolist(),
    ]
