"""`auto`'s choosing: the sample is exactly the plan's, each planted kind gets a family that holds it, at its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from recipes import ITEMS, RECIPES, relative_error

from benchmarks.kernels.planted import layout_of, planted
from mm_sglang.auto import CANDIDATES
from mm_sglang.kernels import choosing, inspection
from mm_sglang.kernels.choosing import choose, for_chunk
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import recall
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import Auto, Boundary, HeadPattern, VerticalSlash, head_pattern
from mm_sglang.kernels.plan import Plan
from mm_sglang.kernels.prefill import make_plan, sparse_prefill
from mm_sglang.kernels.sampling import Sample, sampled

REFERENCE = engine("reference")
TOKENS = 8192


def tensors(prefix: int, queries: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, 4, 16, generator=generator)
    k, v = (torch.randn(prefix + queries, 2, 16, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("prefix, queries", [(0, 611), (200, 411)])
def test_sampled_tiles_attend_what_the_whole_plan_does(name: str, prefix: int, queries: int) -> None:
    q, k, v = tensors(prefix, queries)
    layout, patterns = TokenLayout(items=ITEMS, length=prefix + queries), [head_pattern(RECIPES[name])] * 4
    _, want, plan = sparse_prefill(q, k, v, layout=layout, patterns=patterns, scale=0.4, engine=REFERENCE)
    tiles, out, lse = (1, 3), torch.full_like(q, torch.nan), torch.full((4, queries), torch.nan)
    for group in plan.groups:
        REFERENCE.attend(q, k, v, None, sampled(group, tiles), 0.4, out, lse)
    rows = torch.cat([torch.arange(t * 128, min(t * 128 + 128, queries)) for t in tiles])
    assert relative_error(lse[:, rows], want.T[:, rows].double()) < 1e-6


def family(pattern: HeadPattern) -> str:
    return f"boundary {pattern.boundary}" if isinstance(pattern, Boundary) else pattern.kind


def planted_choice(
    kind: str, density: float, candidates: Sequence[HeadPattern] = CANDIDATES
) -> tuple[Any, tuple[Any, ...]]:
    q, k, v, _ = planted(
        kind, tokens=TOKENS, q_heads=2, kv_heads=1, head_dim=64, seed=1, device="cpu", dtype=torch.float32
    )
    layout = layout_of(kind, TOKENS, "cpu")
    chosen = choose(
        q, k, v, layout=layout, candidates=candidates, density=density, scale=0.125, engine=REFERENCE
    )  # fmt: skip
    return chosen, (q, k, v, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "fa4"])
@pytest.mark.parametrize("kind", ["blocks", "columns", "slashes"])
def test_a_gpu_chooses_as_the_reference_does(name: str, kind: str) -> None:
    """The same tensors: what each head's choice holds and costs is the same, whichever of equal ones it is."""
    made = planted(kind, tokens=TOKENS, q_heads=4, kv_heads=2, head_dim=64, seed=4, device="cuda", dtype=torch.bfloat16)
    q, k, v = made[:3]
    given: dict[str, Any] = dict(candidates=CANDIDATES, density=0.2, scale=0.125, tail=100)
    on_gpu = choose(q, k, v, layout=layout_of(kind, TOKENS, "cuda"), engine=engine(name), **given)
    q, k, v = (x.cpu().float() for x in (q, k, v))
    on_cpu = choose(q, k, v, layout=layout_of(kind, TOKENS, "cpu"), engine=REFERENCE, **given)
    assert on_gpu.recall == pytest.approx(on_cpu.recall, abs=0.02)
    costs = [sum(choice.density) / 4 for choice in (on_gpu, on_cpu)]
    assert costs[0] == pytest.approx(costs[1], rel=0.15) and max(costs) <= 0.2


# A grid and the anchors of a boundary are columns too, once the prompt is there: any of those that hold them is right.
FIXED = {"vertical_slash", "column_blocks", "grid", "boundary q", "boundary 2d"}


@pytest.mark.parametrize(
    "kind, density, right, least",
    [
        ("blocks", 0.2, {"block_topk"}, 0.6),
        ("slashes", 0.3, {"vertical_slash", "block_topk"}, 0.9),  # a diagonal's tiles are blocks, too
        ("columns", 0.15, {"vertical_slash", "column_blocks"}, 0.9),
        ("grid", 0.15, FIXED, 0.9),
        ("boundary", 0.15, FIXED, 0.9),
    ],
)
def test_each_kind_of_head_gets_a_family_that_holds_it(
    kind: str, density: float, right: set[str], least: float
) -> None:
    chosen, (q, k, v, layout) = planted_choice(kind, density)
    assert {family(p) for p in chosen.recipes} <= right
    assert min(chosen.recall) > least and sum(chosen.density) / 2 <= density
    _, lse, plan = sparse_prefill(
        q, k, v, layout=layout, patterns=chosen.recipes, scale=0.125, engine=REFERENCE
    )  # what was said of the sample is true of the whole
    rows = torch.arange(63, TOKENS, 64, dtype=torch.int32)
    whole = recall(lse[rows.long()].T, REFERENCE.ops().row_lse(q, k, None, rows, 0, 0.125))
    torch.testing.assert_close(whole, torch.tensor(chosen.recall), atol=0.15, rtol=0.0)
    assert inspection.density(plan) == pytest.approx(sum(chosen.density) / 2, rel=0.2)


def test_heads_share_one_budget() -> None:
    """Both hold most by the first, which costs one of them three times as much as the second does."""
    held, cost = torch.tensor([[0.9, 0.9], [0.8, 0.85]]), torch.tensor([[0.3, 0.01], [0.1, 0.1]])
    assert choosing._best(held, cost, 0.2) == [0, 0]
    assert choosing._best(held, cost, 0.1) == [1, 0]
    assert choosing._best(held, cost, 0.001) == [1, 0]  # nothing is as cheap: the cheapest


@pytest.mark.parametrize("tail", [0, 300])
def test_a_layer_keeps_to_its_density_with_its_tail(tail: int) -> None:
    """Heads of several kinds, some of which hold more the more they cost."""
    kinds, most = ("blocks", "slashes", "columns", "random"), 0.2
    made = [
        planted(kind, tokens=TOKENS, q_heads=2, kv_heads=1, head_dim=64, seed=3, device="cpu", dtype=torch.float32)[:3]
        for kind in kinds
    ]
    q, k, v = (torch.cat(parts, 1) for parts in zip(*made, strict=True))
    layout = TokenLayout(items=(), length=TOKENS)
    chosen = choose(
        q, k, v, layout=layout, candidates=CANDIDATES, density=most, scale=0.125, engine=REFERENCE, tail=tail
    )
    sample = Sample(q, k, v, layout, 0.125, REFERENCE, None, torch.empty_like(q))
    said = sum(chosen.density) / len(chosen.density) + sample.tail_cost(tail)
    plan = make_plan(q, k, layout=layout, patterns=chosen.recipes, scale=0.125, ops=REFERENCE.ops(), tail=tail)
    assert 0.85 * most < said <= most
    assert inspection.density(plan) == pytest.approx(said, rel=0.03)  # told from 8 of 64 tiles


def test_a_tail_leaves_the_recipes_half() -> None:
    q, k, v = tensors(0, 3000)
    given: dict[str, Any] = dict(layout=TokenLayout(items=(), length=3000), scale=0.4, engine=REFERENCE)
    chosen = choose(q, k, v, candidates=CANDIDATES, density=0.6, tail=2900, **given)
    assert 0.3 * 0.85 < sum(chosen.density) / 4 <= 0.3


def test_slashes_differ_from_columns_and_nobody_looks_nowhere() -> None:
    both = [c for c in CANDIDATES if isinstance(c, VerticalSlash)]
    slashes, columns = (planted_choice(kind, 0.3, both)[0].recipes[0] for kind in ("slashes", "columns"))
    assert slashes.slashes > slashes.columns and columns.columns > columns.slashes


def test_a_chunk_with_a_prefix_in_a_paged_pool_chooses_the_same() -> None:
    q, k, v = tensors(700, 600)
    layout, engine_, rows = TokenLayout(items=ITEMS, length=1300), REFERENCE, torch.randperm(1400)[:1300]
    pool_k, pool_v = torch.full((2, 1400, 2, 16), torch.nan)
    pool_k[rows], pool_v[rows] = k, v
    plain = choose(q, k, v, layout=layout, candidates=CANDIDATES, density=0.5, scale=0.4, engine=engine_)
    paged = choose(
        q, pool_k, pool_v, layout=layout, candidates=CANDIDATES, density=0.5, scale=0.4, engine=engine_,
        slots=rows.int(),
    )  # fmt: skip
    assert plain.recipes == paged.recipes and plain.recall == pytest.approx(paged.recall)


def test_what_one_layer_learnt_of_costs_spares_the_next_its_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    plan = Sample.plan

    def counted(self: Sample, pattern: HeadPattern) -> Plan:
        planned[-1] += 1
        return plan(self, pattern)

    monkeypatch.setattr(Sample, "plan", counted)
    learnt: dict[HeadPattern, float] = {}
    chosen = []
    for given in (learnt, learnt, None):
        q, k, v = tensors(700, 1300)
        planned.append(0)
        chosen.append(
            choose(q, k, v, layout=TokenLayout(items=ITEMS, length=2000), candidates=CANDIDATES, density=0.5,
                   scale=0.4, engine=REFERENCE, learnt=given)
        )  # fmt: skip
    assert learnt and planned[1] < planned[0] == planned[2], planned
    assert chosen[0] == chosen[2] and sum(chosen[1].density) / 4 <= 0.5


def test_a_text_prompt_has_neither_grids_nor_boundaries() -> None:
    q, k, v = tensors(0, 900)
    layout = TokenLayout(items=(), length=900)
    chosen = choose(q, k, v, layout=layout, candidates=CANDIDATES, density=0.4, scale=0.4, engine=REFERENCE)
    assert {family(p) for p in chosen.recipes} <= {"a_shape", "vertical_slash", "block_topk", "column_blocks"}
    with pytest.raises(ValueError, match="needs at least one for this layout"):
        choose(q, k, v, layout=layout, candidates=CANDIDATES[3:5], density=0.4, scale=0.4, engine=REFERENCE)


@pytest.mark.parametrize(
    "name", ["a_shape", "vertical_slash", "block_topk", "column_blocks", "2d_slash", "grid_row_vertical"]
)
def test_a_choice_costs_about_the_same_share_of_a_later_chunk(name: str) -> None:
    big = {"columns": 150, "slashes": 128, "local": 400, "sink": 0, "blocks": 3}
    recipe = {key: big.get(key, value) for key, value in RECIPES[name].items()}
    q, k, _ = tensors(0, 8192)
    shares = []
    then = (1024, 2048)
    for prefix, keys in (then, (6144, 8192)):
        part = for_chunk(head_pattern(recipe), then, (prefix, keys))
        layout = TokenLayout(items=ITEMS, length=keys)
        plan = make_plan(q[prefix:keys], k[:keys], layout=layout, patterns=[part] * 4, scale=0.4, ops=REFERENCE.ops())
        shares.append(inspection.density(plan))
    assert 0.4 < shares[1] / shares[0] < 1.6
    assert for_chunk(head_pattern(recipe), then, then) == head_pattern(recipe)


def test_auto_has_to_be_chosen_first() -> None:
    q, k, v = tensors(0, 200)
    layout = TokenLayout(items=(), length=200)
    with pytest.raises(ValueError, match="auto: has to be chosen first"):
        sparse_prefill(q, k, v, layout=layout, patterns=[Auto()] * 4, scale=0.4, engine=REFERENCE)
    assert Auto(density=0.2).scaled(2) == Auto(density=0.4) and Auto(density=0.9).scaled(4).density < 1
