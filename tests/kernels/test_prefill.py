"""Every pattern: the plan attends exactly the brute-force set, and the engine computes exactly that softmax."""

from __future__ import annotations

from typing import Any

import brute_force
import numpy as np
import pytest
import torch

from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.layout import IMAGE, VIDEO, TokenLayout, consume_grids
from mm_sglang.kernels.patterns import Dense, head_pattern
from mm_sglang.kernels.plan import Plan
from mm_sglang.kernels.prefill import make_plan, sparse_prefill

REFERENCE = engine("reference")
HEAD_DIM, SCALE = 16, 0.7  # a scale that peaks the weights, so that budgets mean something

# Text, an image, a video of one span, text, a Qwen3-VL video (a span a frame, timestamps between), text.
ITEMS = (
    *consume_grids(IMAGE, [(1, 8, 12)], [(20, 44)], 2),
    *consume_grids(VIDEO, [(6, 10, 14)], [(50, 260)], 2),
    *consume_grids(VIDEO, [(5, 8, 8)], [(270, 286), (290, 306), (310, 326), (330, 346), (350, 366)], 2),
)
RECIPES: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "dense"},
    "a_shape": {"pattern": "a_shape", "sink": 5, "local": 40},
    "vertical_slash": {"pattern": "vertical_slash", "columns": 37, "slashes": 9, "sink": 3, "local": 4, "last_q": 17},
    "grid_frame": {
        "pattern": "grid", "stride": "frame", "lines": 3, "vertical": True, "horizontal": True,
        "sink": 4, "local": 20, "last_q": 64,
    },
    "grid_row_vertical": {
        "pattern": "grid", "stride": "row", "lines": 1, "vertical": True, "horizontal": False,
        "sink": 0, "local": 1, "last_q": 5,
    },
    "grid_horizontal": {
        "pattern": "grid", "stride": "frame", "lines": 2, "vertical": False, "horizontal": True,
        "sink": 0, "local": 30, "last_q": 33,
    },
}  # fmt: skip
# (prefix, queries): whole prompts of odd lengths, one tile and less, chunks that start and end inside a frame,
# a radix hit that leaves a few tokens, one query.
SHAPES = [(0, 1), (0, 77), (0, 128), (0, 611), (100, 129), (256, 355), (300, 7), (610, 1)]


def tensors(prefix: int, queries: int, heads: int, kv_heads: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, heads, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, prefix + queries, kv_heads, HEAD_DIM, generator=generator)
    return q, k, v


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def expected(recipes: list[dict[str, Any]], q: torch.Tensor, k: torch.Tensor, prefix: int) -> list[Any]:
    """Brute-force kept sets of each head."""
    coordinates = TokenLayout(items=ITEMS, length=len(k)).coordinates[[1, 3, 4]].T.tolist()
    cols = [item.cols for item in ITEMS]
    return brute_force.kept_by_head(recipes, q.double().numpy(), k.double().numpy(), prefix, SCALE, coordinates, cols)


DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@DEVICES
@pytest.mark.parametrize("prefix, queries", SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_attended_set_is_the_brute_force_mask(name: str, prefix: int, queries: int, device: str) -> None:
    recipe = RECIPES[name]
    q, k, _ = tensors(prefix, queries, heads=6, kv_heads=2, seed=prefix + queries)
    layout = TokenLayout(items=ITEMS, length=prefix + queries, device=device)
    plan = make_plan(q.to(device), k.to(device), layout=layout, patterns=[head_pattern(recipe)] * 6, scale=SCALE)
    plan.check()
    for head, sets in enumerate(expected([recipe] * 6, q, k, prefix)):
        attended = plan.attended(head).numpy()
        np.testing.assert_array_equal(attended, brute_force.tiled(queries, prefix, *sets))
        assert not (brute_force.token_set(queries, prefix, *sets) & ~attended).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_pytorch_does(dtype: torch.dtype) -> None:
    recipes = list(RECIPES.values())
    q, k, v = (x.to(dtype) for x in tensors(256, 355, heads=len(recipes), kv_heads=2, seed=9))
    out, _, plan = sparse_prefill(
        q, k, v, layout=TokenLayout(items=ITEMS, length=611), patterns=[head_pattern(r) for r in recipes],
        scale=SCALE, engine=REFERENCE,
    )  # fmt: skip
    assert out.dtype == dtype
    for head in range(len(recipes)):
        kv, mask = head // (len(recipes) // 2), plan.attended(head)
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
    plan.check()
    out, lse = out.cpu(), lse.cpu()
    for head, sets in enumerate(expected(recipes, q, k, prefix)):
        mask = torch.from_numpy(brute_force.tiled(queries, prefix, *sets))
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


@pytest.mark.parametrize("name", RECIPES)
def test_budgets_that_cover_everything_are_dense(name: str) -> None:
    whole = {"columns": 10**6, "slashes": 10**6, "local": 10**6, "lines": 10**6}
    recipe = {key: whole.get(key, value) for key, value in RECIPES[name].items()}
    q, k, v = tensors(130, 300, heads=4, kv_heads=2, seed=5)
    common = {"layout": TokenLayout(items=ITEMS, length=430), "scale": SCALE, "engine": REFERENCE}
    out, lse, plan = sparse_prefill(q, k, v, patterns=[head_pattern(recipe)] * 4, **common)  # type: ignore[arg-type]
    dense, dense_lse, _ = sparse_prefill(q, k, v, patterns=[Dense()] * 4, **common)  # type: ignore[arg-type]
    causal = torch.ones(300, 430, dtype=torch.bool).tril(130)
    assert all(torch.equal(plan.attended(h), causal) for h in range(4))
    torch.testing.assert_close(out, dense)
    torch.testing.assert_close(lse, dense_lse)


def test_grid_finds_the_planted_phase() -> None:
    """A head that looks at one place of every frame: that place's keys are kept, and few others."""
    layout = TokenLayout(
        items=tuple(consume_grids(VIDEO, [(40, 14, 28)], [(10, 10 + 40 * 98)], 2)), length=10 + 40 * 98
    )
    q, k, _ = tensors(0, layout.length, heads=2, kv_heads=1, seed=3)
    direction = torch.nn.functional.normalize(torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(0)), dim=0)
    planted = (layout.item >= 0) & (layout.y == 3) & (layout.x == 5)
    q, k = q + 6 * direction, k + 6 * planted[:, None, None] * direction
    recipe = {"pattern": "grid", "lines": 1, "sink": 16, "local": 64, "horizontal": False}
    plan = make_plan(q, k, layout=layout, patterns=[head_pattern(recipe)] * 2, scale=HEAD_DIM**-0.5)
    attended = plan.attended(0)
    causal = torch.ones_like(attended).tril()
    assert torch.equal(attended[:, planted], causal[:, planted])
    # a row of tiles: one tile of columns (40 frames, 16 sink and 10 text keys), and two or three along the diagonal
    group = plan.groups[0]
    assert int((group.full_count + group.partial_count).max()) <= 4


def test_a_query_without_visible_keys_gives_zero_and_minus_infinity() -> None:
    q, k, v = tensors(0, 200, heads=1, kv_heads=1, seed=1)
    plan = make_plan(q, k, layout=TokenLayout(items=(), length=200), patterns=[Dense()], scale=SCALE)
    group = plan.groups[0]
    group.full_count[0, 1] = group.partial_count[0, 1] = 0  # the second row of tiles sees nothing now
    out, lse = REFERENCE.attend(q, k, v, plan, SCALE)
    assert torch.equal(out[128:], torch.zeros(72, 1, HEAD_DIM))
    assert (lse[128:] == float("-inf")).all()
    assert out[:128].isfinite().all() and lse[:128].isfinite().all()


def broken_plans() -> list[Any]:
    def swap(plan: Plan) -> None:
        plan.groups[0].k_order[0, 0] = 1

    def repeat(plan: Plan) -> None:
        plan.groups[0].full_index[0, 1, 0] = plan.groups[0].partial_index[0, 1, 0]

    def future(plan: Plan) -> None:
        plan.groups[0].full_index[0, 1, 0] = 2

    return [(swap, "k_order"), (repeat, "full_index"), (future, "full_index")]


@pytest.mark.parametrize("damage, message", broken_plans())
def test_plan_check_refuses(damage: Any, message: str) -> None:
    q, k, _ = tensors(0, 400, heads=1, kv_heads=1, seed=1)
    plan = make_plan(q, k, layout=TokenLayout(items=(), length=400), patterns=[Dense()], scale=SCALE)
    plan.check()
    damage(plan)
    with pytest.raises(ValueError, match=message):
        plan.check()


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
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(4, 4, HEAD_DIM), "k": torch.zeros(8, 2, HEAD_DIM), "v": torch.zeros(8, 2, HEAD_DIM),
        "layout": TokenLayout(items=(), length=8), "patterns": [Dense()] * 4, "scale": 1.0, "engine": REFERENCE,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_prefill(**(arguments | change))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine='fa4': needs one of"):
        engine("fa4")
