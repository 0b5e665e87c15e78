"""Every pattern: the plan attends exactly the brute-force set, and the engine computes exactly that softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import brute_force
import numpy as np
import pytest
import torch
from recipes import ITEMS, PATTERNS, RECIPES, SHAPES, relative_error

from mm_sglang.kernels import plan as plan_module
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import attended, check
from mm_sglang.kernels.layout import VIDEO, TokenLayout, consume_grids
from mm_sglang.kernels.ops import reference_ops, triton_ops
from mm_sglang.kernels.patterns import Dense, head_pattern
from mm_sglang.kernels.patterns.boundary import NAMES
from mm_sglang.kernels.plan import TileLists
from mm_sglang.kernels.prefill import make_plan, sparse_prefill, sparse_prefill_varlen

REFERENCE = engine("reference")
OPS = {"cpu": reference_ops, "cuda": triton_ops}  # the GPU twins must attend the very same sets
HEAD_DIM, SCALE = 16, 0.7  # a scale that peaks the weights, so that budgets mean something


def tensors(prefix: int, queries: int, heads: int, kv_heads: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, heads, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, prefix + queries, kv_heads, HEAD_DIM, generator=generator)
    return q, k, v


def expected(recipes: list[dict[str, Any]], q: torch.Tensor, k: torch.Tensor) -> list[torch.Tensor]:
    """Brute-force mask of each head."""
    what = [tuple(c) for c in TokenLayout(items=ITEMS, length=len(k)).coordinates[1:].T.tolist()]
    grids = [(item.frames, item.rows, item.cols) for item in ITEMS if item.spans[0][0] < len(k)]
    prompt = brute_force.Prompt(q=q.double().numpy(), k=k.double().numpy(), scale=SCALE, what=what, grids=grids)
    return [torch.from_numpy(mask) for mask in brute_force.attended_by_head(recipes, prompt)]


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize("prefix, queries", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_attended_set_is_the_brute_force_mask(name: str, prefix: int, queries: int, device: str) -> None:
    recipe = RECIPES[name]
    q, k, _ = tensors(prefix, queries, heads=6, kv_heads=2, seed=prefix + queries)
    layout = TokenLayout(items=ITEMS, length=prefix + queries, device=device)
    plan = make_plan(
        q.to(device), k.to(device), layout=layout, patterns=[head_pattern(recipe)] * 6, scale=SCALE, ops=OPS[device]()
    )
    check(plan)
    for head, mask in enumerate(expected([recipe] * 6, q, k)):
        np.testing.assert_array_equal(attended(plan, head).numpy(), mask.numpy())


@DEVICES
@pytest.mark.parametrize(
    "prefix, queries, tail", [(0, 611, 200), (256, 355, 40), (300, 190, 200), (610, 1, 200), (0, 300, 40)]
)
def test_the_texts_tail_attends_every_key(prefix: int, queries: int, tail: int, device: str) -> None:
    """Queries after all that is shown, of all heads but dense ones; none in a chunk that ends among frames."""
    length, shown = prefix + queries, 366
    own = max(0, min(tail, queries, length - shown))
    recipes = list(RECIPES.values())
    q, k, v = tensors(prefix, queries, heads=2 * len(recipes), kv_heads=2, seed=length)
    patterns = [head_pattern(r) for r in recipes] * 2
    out, _, plan = sparse_prefill(
        q.to(device), k.to(device), v.to(device), layout=TokenLayout(items=ITEMS, length=length, device=device),
        patterns=patterns, scale=SCALE, engine=REFERENCE, tail=tail,
    )  # fmt: skip
    check(plan)
    assert (own > 0) is (length > shown)
    assert (plan.groups[-1].pattern.kind == "text_tail") is (0 < own < queries)
    if own == queries:
        assert [group.pattern.kind for group in plan.groups] == ["dense"]
    elif own:
        dense = [head for head, pattern in enumerate(patterns) if pattern.kind == "dense"]
        assert sorted([*plan.groups[-1].members, *dense]) == list(range(len(patterns)))
    causal = torch.ones(queries, length, dtype=torch.bool).tril(prefix)
    for head, mask in enumerate(expected(recipes * 2, q, k)):
        want = torch.cat([mask[: queries - own], causal[queries - own :]])
        np.testing.assert_array_equal(attended(plan, head).numpy(), want.numpy())
        logits = (q[:, head].double() @ k[:, head // len(recipes)].double().T * SCALE).masked_fill(~want, -math.inf)
        whole = logits.softmax(-1) @ v[:, head // len(recipes)].double()
        torch.testing.assert_close(out[:, head].cpu().double(), whole, rtol=1e-4, atol=1e-5)


def test_no_tail_where_all_heads_are_dense() -> None:
    q, k, _ = tensors(0, 500, heads=4, kv_heads=2, seed=1)
    plan = make_plan(
        q,
        k,
        layout=TokenLayout(items=ITEMS, length=500),
        patterns=[Dense()] * 4,
        scale=SCALE,
        ops=OPS["cpu"](),
        tail=128,
    )
    assert [group.pattern.kind for group in plan.groups] == ["dense"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_pytorch_does(dtype: torch.dtype) -> None:
    recipes = list(RECIPES.values())
    recipes += recipes[: -len(recipes) % 2]  # as many for each KV head
    q, k, v = (x.to(dtype) for x in tensors(256, 355, heads=len(recipes), kv_heads=2, seed=9))
    out, _, plan = sparse_prefill(
        q, k, v, layout=TokenLayout(items=ITEMS, length=611), patterns=[head_pattern(r) for r in recipes],
        scale=SCALE, engine=REFERENCE,
    )  # fmt: skip
    assert out.dtype == dtype
    for head in range(len(recipes)):
        kv, mask = head // (len(recipes) // 2), attended(plan, head)
        weights = (q[:, head].double() @ k[:, kv].double().T * SCALE).masked_fill(~mask, float("-inf")).softmax(-1)
        want = weights @ v[:, kv].double()
        torchs = torch.nn.functional.scaled_dot_product_attention(
            q[None, :, head], k[None, :, kv], v[None, :, kv], attn_mask=mask, scale=SCALE
        )[0]
        assert relative_error(out[:, head], want) <= 2 * relative_error(torchs, want)


@DEVICES
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (7, 1), (16, 2)])
@pytest.mark.parametrize("prefix, queries", [(0, 611), (256, 355), (300, 7)])
def test_engine_is_the_softmax_over_the_attended_set(
    heads: int, kv_heads: int, prefix: int, queries: int, device: str
) -> None:
    recipes = [list(RECIPES.values())[h % len(RECIPES)] for h in range(heads)]  # all patterns in one plan
    q, k, v = tensors(prefix, queries, heads, kv_heads, seed=heads)
    layout = TokenLayout(items=ITEMS, length=len(k), device=device)
    out, lse, plan = sparse_prefill(
        q.to(device), k.to(device), v.to(device),
        layout=layout, patterns=[head_pattern(r) for r in recipes], scale=SCALE, engine=REFERENCE,
    )  # fmt: skip
    check(plan)
    out, lse = out.cpu(), lse.cpu()
    for head, mask in enumerate(expected(recipes, q, k)):
        logits = (q[:, head].double() @ k[:, head // (heads // kv_heads)].double().T) * SCALE
        logits = logits.masked_fill(~mask, float("-inf"))
        want = logits.softmax(-1) @ v[:, head // (heads // kv_heads)].double()
        # the yardstick is what PyTorch's own attention loses in this dtype, not a number picked by hand
        kv = head // (heads // kv_heads)
        torchs = torch.nn.functional.scaled_dot_product_attention(
            q[None, :, head], k[None, :, kv], v[None, :, kv], attn_mask=mask, scale=SCALE
        )[0]
        assert relative_error(out[:, head], want) <= 2 * relative_error(torchs, want)
        assert relative_error(lse[:, head], logits.logsumexp(-1)) <= 1e-6


@pytest.mark.parametrize("name", PATTERNS)
def test_budgets_that_cover_everything_are_dense(name: str) -> None:
    whole = {"columns": 10**6, "slashes": 10**6, "local": 10**6, "lines": 10**6, "blocks": 10**6}
    recipe = {key: whole.get(key, value) for key, value in PATTERNS[name].items() if key != "coverage"}
    q, k, v = tensors(130, 300, heads=4, kv_heads=2, seed=5)
    common = {"layout": TokenLayout(items=ITEMS, length=430), "scale": SCALE, "engine": REFERENCE}
    out, lse, plan = sparse_prefill(q, k, v, patterns=[head_pattern(recipe)] * 4, **common)  # type: ignore[arg-type]
    dense, dense_lse, _ = sparse_prefill(q, k, v, patterns=[Dense()] * 4, **common)  # type: ignore[arg-type]
    causal = torch.ones(300, 430, dtype=torch.bool).tril(130)
    assert all(torch.equal(attended(plan, h), causal) for h in range(4))
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)


def planted_grid(stride: str, on: torch.Tensor, layout: TokenLayout) -> Any:
    """The plan of a head that looks at the keys `on` ([N] bool), and its attended set."""
    q, k, _ = tensors(0, layout.length, heads=2, kv_heads=1, seed=3)
    direction = torch.nn.functional.normalize(torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(0)), dim=0)
    q, k = q + 6 * direction, k + 6 * on[:, None, None] * direction
    recipe = {"pattern": "grid", "stride": stride, "lines": 1, "sink": 16, "local": 64, "horizontal": False}
    plan = make_plan(
        q, k, layout=layout, patterns=[head_pattern(recipe)] * 2, scale=HEAD_DIM**-0.5, ops=reference_ops()
    )
    return plan, attended(plan, 0)


LONG = TokenLayout(items=tuple(consume_grids(VIDEO, [(40, 14, 28)], [(10, 10 + 40 * 98)], 2)), length=10 + 40 * 98)


def test_grid_finds_the_planted_phase() -> None:
    """A head that looks at one place of every frame: that place's keys are kept, and few others."""
    planted = (LONG.item >= 0) & (LONG.y == 3) & (LONG.x == 5)
    plan, seen = planted_grid("frame", planted, LONG)
    causal = torch.ones_like(seen).tril()
    assert torch.equal(seen[:, planted], causal[:, planted])
    # a row of tiles: one tile of columns (40 frames, 16 sink and 10 text keys), and two or three along the diagonal
    lists = plan.groups[0].lists()
    assert int((lists.full_count + lists.partial_count).max()) <= 4


@pytest.mark.parametrize(
    "name, on",
    [
        ("one place of every frame", (LONG.y == 3) & (LONG.x == 5)),
        ("one place of every second frame", (LONG.y == 3) & (LONG.x == 5) & (LONG.t % 2 == 1)),
        ("one place of every row", LONG.x == 5),
        ("one place of every second row", (LONG.x == 5) & (LONG.y % 2 == 1)),
    ],
)
def test_grid_finds_the_planted_stride(name: str, on: torch.Tensor) -> None:
    planted = (LONG.item >= 0) & on
    plan, _ = planted_grid("auto", planted, LONG)
    group = plan.groups[0]
    columns = group.k_positions()[0, : int(group.start[0, 1])]
    columns = columns[columns < LONG.length].long()
    rest = columns[(columns >= 16) & (LONG.item[columns] >= 0)]
    assert torch.equal(rest, torch.where(planted)[0][torch.where(planted)[0] >= 16])


def test_a_query_without_visible_keys_gives_zero_and_minus_infinity() -> None:
    """In a 2d boundary a text query at the prompt's start may have no vision key, and here no text key either."""
    nothing = {"pattern": "a_shape", "sink": 0, "local": 1}
    layout = TokenLayout(items=tuple(consume_grids(VIDEO, [(2, 16, 16)], [(200, 328)], 2)), length=400)
    q, k, v = tensors(0, 400, heads=1, kv_heads=1, seed=1)
    pattern = head_pattern({"boundary": "2d", "parts": dict.fromkeys(NAMES["2d"], nothing)})
    plan = make_plan(q, k, layout=layout, patterns=[pattern], scale=SCALE, ops=reference_ops())
    blind = [n for n in range(400) if not attended(plan, 0)[n].any()]
    out, lse, _ = sparse_prefill(q, k, v, layout=layout, patterns=[pattern], scale=SCALE, engine=REFERENCE)
    assert out.isfinite().all() and not lse.isnan().any()
    assert (lse[blind] == float("-inf")).all() and not out[blind].any()
    emptied = replace(plan.groups[0], tile_lists=lambda *a: empty(reference_ops().tile_lists(*a)))
    out, lse = torch.full_like(q, float("nan")), torch.full((1, 400), float("nan"))
    REFERENCE.attend(q, k, v, None, emptied, SCALE, out, lse)
    assert not out.any() and (lse == float("-inf")).all()


def empty(lists: TileLists) -> TileLists:
    return replace(
        lists, full_count=torch.zeros_like(lists.full_count), partial_count=torch.zeros_like(lists.partial_count)
    )


def broken_plans() -> list[Any]:
    def twice(order: torch.Tensor, lists: TileLists) -> None:
        order[0, 0] = 1

    def repeat(order: torch.Tensor, lists: TileLists) -> None:
        lists.full_index[0, 1, 0] = lists.partial_index[0, 1, 0]

    def future(order: torch.Tensor, lists: TileLists) -> None:
        lists.full_index[0, 1, 0] = 2

    return [(twice, "k_order"), (repeat, "full_index"), (future, "full_index")]


@pytest.mark.parametrize("damage, message", broken_plans())
def test_check_refuses_a_broken_plan(damage: Any, message: str) -> None:
    q, k, _ = tensors(0, 400, heads=1, kv_heads=1, seed=1)
    plan = make_plan(
        q, k, layout=TokenLayout(items=(), length=400), patterns=[Dense()], scale=SCALE, ops=reference_ops()
    )
    check(plan)
    order, lists = plan.groups[0].k_positions().clone(), plan.groups[0].lists()
    damage(order, lists)
    group = replace(plan.groups[0], k_order=order, tile_lists=lambda *_: lists)
    with pytest.raises(ValueError, match=message):
        check(replace(plan, groups=(group,)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(4, 3, HEAD_DIM)}, "multiple"),
        ({"q": torch.zeros(0, 4, HEAD_DIM)}, "at least one"),
        ({"q": torch.zeros(9, 4, HEAD_DIM)}, "a key for each"),
        ({"q": torch.zeros(4, 4, HEAD_DIM + 1)}, r"needs \[Nq, H, D\]"),
        ({"layout": TokenLayout(items=(), length=7)}, "layout of 7 positions: needs 8"),
        ({"patterns": [Dense()] * 3}, "3 patterns: needs 4"),
        ({"v": torch.zeros(7, 2, HEAD_DIM)}, "needs k's shape"),
        ({"layout": TokenLayout(items=(), length=8, device="meta")}, "layout on meta: needs one device"),
        ({"k": torch.zeros(8, 2, HEAD_DIM).half()}, "q is torch.float32, k torch.float16, v torch.float32: needs one"),
        ({"slots": torch.zeros(8, dtype=torch.int64)}, r"slots torch.int64 \(8,\): needs contiguous int32"),
        ({"slots": torch.zeros(7, dtype=torch.int32)}, "layout of 8 positions: needs 7"),
        ({"out": torch.zeros(4, 4, HEAD_DIM).half()}, "out .*: needs contiguous"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(4, 4, HEAD_DIM), "k": torch.zeros(8, 2, HEAD_DIM), "v": torch.zeros(8, 2, HEAD_DIM),
        "layout": TokenLayout(items=(), length=8), "patterns": [Dense()] * 4, "scale": 1.0, "engine": REFERENCE,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**(arguments | change))


@pytest.mark.parametrize("paged", [False, True])
def test_several_prompts_of_different_lengths(paged: bool) -> None:
    queries, lengths = [130, 1, 77], [430, 300, 77]
    q = torch.cat([tensors(0, n, 4, 2, seed=n)[0] for n in queries])
    k, v = (torch.cat([tensors(0, n, 4, 2, seed=n)[part] for n in lengths]) for part in (1, 2))
    layouts = [TokenLayout(items=ITEMS if n > 366 else (), length=n) for n in lengths]
    patterns = [head_pattern(RECIPES[name]) for name in ("grid_frame", "2d_slash", "dense", "block_topk")]
    common: dict[str, Any] = {"patterns": patterns, "scale": SCALE, "engine": REFERENCE, "tail": 30}
    rows = [torch.arange(sum(lengths[:n]), sum(lengths[: n + 1])).int() for n in range(3)]
    out, lse, plans = sparse_prefill_varlen(
        q, k, v, queries=queries, layouts=layouts, slots=rows if paged else None, **common
    )
    for n, layout in enumerate(layouts):
        own = slice(sum(queries[:n]), sum(queries[: n + 1]))
        at = rows[n].long()
        want, want_lse, plan = sparse_prefill(q[own], k[at], v[at], layout=layout, **common)
        assert torch.equal(out[own], want) and torch.equal(lse[own], want_lse) and plans[n].keys == plan.keys


@pytest.mark.parametrize(
    "change, message",
    [
        ({"queries": [3, 2]}, r"queries=\[3, 2\]: needs at least one each and 4 together"),
        ({"queries": [4, 0]}, "needs at least one each"),
        ({"queries": [4]}, "needs one of each a prompt"),
        ({"layouts": [TokenLayout(items=(), length=n) for n in (5, 4)]}, r"layouts of \[5, 4\] positions: needs 8"),
        ({"layouts": [TokenLayout(items=(), length=n) for n in (7, 1)]}, "2 queries, 1 keys"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(4, 4, HEAD_DIM), "k": torch.zeros(8, 2, HEAD_DIM), "v": torch.zeros(8, 2, HEAD_DIM),
        "queries": [2, 2], "layouts": [TokenLayout(items=(), length=4)] * 2, "patterns": [Dense()] * 4, "scale": 1.0,
        "engine": REFERENCE,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_prefill_varlen(**(arguments | change))


def test_slices_of_a_long_range_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(256, 700, heads=len(RECIPES), kv_heads=1, seed=2)
    patterns = [head_pattern(recipe | {"residual": True}) for recipe in RECIPES.values()]
    results = []
    for slice_bytes in (plan_module.LIST_BYTES, 1):
        monkeypatch.setattr(plan_module, "LIST_BYTES", slice_bytes)
        monkeypatch.setattr(plan_module, "SLICE_TILES", slice_bytes)
        layout = TokenLayout(items=ITEMS, length=len(k))
        results.append(sparse_prefill(q, k, v, layout=layout, patterns=patterns, scale=SCALE, engine=REFERENCE))
        number = [len(list(group.slices())) for group in results[-1][2].groups if group.query_tiles > 1]
        assert max(number) == 1 if slice_bytes > 1 else min(number) > 1
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


def test_an_engine_that_is_unknown_or_can_not_run_here_is_refused() -> None:
    with pytest.raises(ValueError, match="engine='fa5': needs one of"):
        engine("fa5")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="engine='fa4' can't run here: no CUDA device"):
            engine("fa4")
