"""Triton twins against their references: in Triton's interpreter on a CPU, compiled on a CUDA device.

Planning twins are compared through whole plans (every pattern and boundary); engines on the attended set of the plan.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported

from recipes import ITEMS, RECIPES, SHAPES, listed_once, relative_error

from mm_sglang.kernels.attend.splits import parts_for
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import attended, check, tile_map
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import reference_ops, triton_ops
from mm_sglang.kernels.patterns import head_pattern
from mm_sglang.kernels.prefill import make_plan, sparse_prefill
from mm_sglang.kernels.sampling import sampled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE, TAIL = 0.3, 50
ENGINES = ["triton", pytest.param("fa4", marks=pytest.mark.gpu)]
# (prefix, queries). The interpreter takes seconds a tile: both end inside a tile, the second one is past every item.
INTERPRETED = [(100, 129), (200, 190)]
MORE = [(0, 77), (0, 611), (256, 355), (610, 1)]


def tensors(
    prefix: int, queries: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(queries, heads, dim, generator=generator)
    k, v = torch.randn(2, prefix + queries, kv_heads, dim, generator=generator)
    return tuple(x.to(DEVICE, dtype) for x in (q, k, v))


@pytest.mark.parametrize("prefix, queries", INTERPRETED[1:] if DEVICE == "cpu" else SHAPES)
@pytest.mark.parametrize("name", RECIPES)
def test_plans_are_the_references(name: str, prefix: int, queries: int) -> None:
    """Every stage's twin at once: same orders, same tiles, on heads that share a KV head with others and alone."""
    patterns = [head_pattern(RECIPES[name]), head_pattern(RECIPES["dense"])] + [head_pattern(RECIPES[name])] * 4
    q, k, _ = tensors(prefix, queries, 6, 2, 16, torch.float32, seed=queries)
    plans = []
    for ops in (reference_ops, triton_ops):
        layout = TokenLayout(items=ITEMS, length=prefix + queries, device=DEVICE)
        plans.append(make_plan(q, k, layout=layout, patterns=patterns, scale=SCALE, ops=ops()))
    plans = [listed_once(plan) for plan in plans]
    check(plans[1])
    for want, got in zip(plans[0].groups, plans[1].groups, strict=True):
        assert torch.equal(want.k_positions(), got.k_positions()) and torch.equal(want.limits, got.limits)
        for head in want.members:
            assert torch.equal(tile_map(want, head), tile_map(got, head))


def run(
    name: str, recipes: list[dict[str, Any]], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: bool
) -> None:
    """The engine's output and lse against fp32 over the attended set; the bound is what SDPA loses in this dtype."""
    slots, k_pool, v_pool = None, k, v
    if paged:  # rows of other requests are NaN, as a pool's may be
        slots = torch.randperm(len(k) + 50, device=k.device)[: len(k)].int()
        pools = torch.full((2, len(k) + 50, *k.shape[1:]), float("nan"), dtype=k.dtype, device=k.device)
        pools[0, slots.long()], pools[1, slots.long()] = k, v
        k_pool, v_pool = pools
    layout = TokenLayout(items=ITEMS, length=len(k), device=DEVICE)
    patterns = [head_pattern(recipe) for recipe in recipes]
    out, lse, plan = sparse_prefill(
        q, k_pool, v_pool, layout=layout, patterns=patterns, scale=SCALE, engine=engine(name), slots=slots,
        tail=TAIL,
    )  # fmt: skip
    plan, share = listed_once(plan), q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        mask = attended(plan, head).to(DEVICE)
        own, keys, values = (x[:, h].float() for x, h in ((q, head), (k, head // share), (v, head // share)))
        logits = (own @ keys.T * SCALE).masked_fill(~mask, float("-inf"))
        want = (logits.softmax(-1) @ values).double()
        torchs = torch.nn.functional.scaled_dot_product_attention(
            q[None, :, head], k[None, :, head // share], v[None, :, head // share], attn_mask=mask, scale=SCALE
        )[0]
        floor = torch.finfo(q.dtype).eps / 8
        assert relative_error(out[:, head], want) <= 2 * max(relative_error(torchs, want), floor), head
        assert relative_error(lse[:, head], logits.logsumexp(-1).double()) <= 1e-3, head


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("prefix, queries", INTERPRETED[:1] if DEVICE == "cpu" else MORE)
@pytest.mark.parametrize("name", ["a_shape", "grid_frame", "2d_mixed"] if DEVICE == "cpu" else RECIPES)
@pytest.mark.parametrize("kind", ENGINES)
def test_engines_compute_the_attended_softmax(kind: str, name: str, prefix: int, queries: int, paged: bool) -> None:
    if DEVICE == "cpu":
        cases = [(7, 1, 16, torch.float32)]
    else:
        cases = [(7, 1, 128, torch.bfloat16), (8, 1, 64, torch.float16), (4, 4, 128, torch.bfloat16)]
    for heads, kv_heads, dim, dtype in cases:
        q, k, v = tensors(prefix, queries, heads, kv_heads, dim, dtype, seed=heads)
        run(kind, [RECIPES[name]] * heads, q, k, v, paged)


@pytest.mark.parametrize("kind", ENGINES)
def test_all_recipes_mixed_freely_over_heads(kind: str) -> None:
    recipes = [*RECIPES.values()]
    recipes += recipes[: -len(recipes) % 3]  # as many for each KV head
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    q, k, v = tensors(200, 190, len(recipes), 3, 16 if DEVICE == "cpu" else 128, dtype, seed=4)
    run(kind, recipes, q, k, v, paged=True)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix, queries", [(40_000, 130), (20_011, 47)])
def test_a_questions_tile_is_run_in_parts(prefix: int, queries: int) -> None:
    """Long enough for kernels/attend/splits.py, with text after all that is shown and a chunk's end inside a tile."""
    for heads, kv_heads, dim, dtype in [(7, 1, 128, torch.bfloat16), (8, 2, 64, torch.float16)]:
        assert parts_for(heads, (prefix + queries) // 128) > 1
        q, k, v = tensors(prefix, queries, heads, kv_heads, dim, dtype, seed=heads)
        run("fa4", [RECIPES["vertical_slash"]] * heads, q, k, v, paged=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["triton", "fa4"])
def test_other_lengths_need_no_other_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server sees a new length with every request: compiling for it would cost seconds, every time."""
    import triton

    compiled: list[str] = []

    def note(**details: Any) -> None:
        compiled.append(details["fn"].name)

    def run_all(prefix: int, queries: int) -> None:
        q, k, v = tensors(prefix, queries, len(RECIPES), 1, 64, torch.float16, seed=queries)
        layout = TokenLayout(items=ITEMS, length=len(k), device=DEVICE)
        patterns = [head_pattern(recipe) for recipe in RECIPES.values()]
        sparse_prefill(q, k, v, layout=layout, patterns=patterns, scale=SCALE, engine=engine(kind), tail=TAIL)

    for warm in ((0, 9001), (1008, 1000), (0, 9008), (0, 100)):
        run_all(*warm)
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", note)
    before = _fa4_kernels() if kind == "fa4" else 0
    for lengths in ((0, 12288), (4096, 8192), (777, 9003), (5000, 1600), (0, 2048), (16000, 129), (0, 60_000)):
        run_all(*lengths)
    assert compiled == []
    assert kind != "fa4" or _fa4_kernels() == before


def _fa4_kernels() -> int:
    from flash_attn.cute.interface import _flash_attn_fwd

    cache = _flash_attn_fwd.compile_cache
    return len(getattr(cache, "cache", cache))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("prefix, queries", [(0, 77), (300, 130)])
def test_recall_from_two_log_sum_exps(prefix: int, queries: int, paged: bool) -> None:
    """exp(sparse lse - dense lse) is the share of the dense softmax that a plan attends."""
    q, k, v = tensors(prefix, queries, 6, 2, 16, torch.float32, seed=prefix)
    rows = torch.tensor([0, 3, queries // 2, queries - 1], dtype=torch.int32, device=DEVICE)
    pool, slots = k, None
    if paged:
        slots = torch.randperm(len(k) + 50, device=k.device)[: len(k)].int()
        pool = torch.full((len(k) + 50, *k.shape[1:]), float("nan"), device=DEVICE)
        pool[slots.long()] = k
    dense = triton_ops().row_lse(q, pool, slots, rows, prefix, SCALE)
    torch.testing.assert_close(dense, reference_ops().row_lse(q, pool, slots, rows, prefix, SCALE))
    layout = TokenLayout(items=ITEMS, length=prefix + queries, device=DEVICE)
    patterns = [head_pattern(RECIPES["vertical_slash"])] * 6
    _, lse, plan = sparse_prefill(q, k, v, layout=layout, patterns=patterns, scale=SCALE, engine=engine("reference"))
    recall = (lse[rows.long()].T - dense).exp()
    causal = torch.arange(prefix + queries, device=DEVICE) <= (prefix + rows)[:, None]
    for head in range(6):
        logits = (q[rows.long(), head] @ k[:, head // 3].T * SCALE).masked_fill(~causal, float("-inf"))
        share = (logits.softmax(1) * attended(plan, head).to(DEVICE)[rows.long()]).sum(1)
        torch.testing.assert_close(recall[head], share, rtol=1e-4, atol=1e-5)


def test_merge_is_the_references() -> None:
    from mm_sglang.kernels.merge import gpu, reference

    out, other = torch.randn(2, 77, 3, 16, device=DEVICE)
    lse, other_lse = torch.randn(2, 3, 77, device=DEVICE) * 5
    lse[0, :9], other_lse[0, 5:20] = float("-inf"), float("-inf")
    out[5:9, 0] = other[5:9, 0] = 0.0  # neither saw a key
    want, want_lse = out.clone(), lse.clone()
    reference.merge(want, want_lse, other, other_lse)
    gpu.merge(out, lse, other, other_lse)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert (lse[0, 5:9] == float("-inf")).all()


@pytest.mark.parametrize("name", ["grid_horizontal", "block_topk", "q_slash", "2d_slash"])
@pytest.mark.parametrize("engine_name", ENGINES)
def test_a_sample_of_a_plan_attends_what_the_whole_does(engine_name: str, name: str) -> None:
    """What `auto` judges by: query tiles cut out of their groups, on the planning operations of this device."""
    prefix, queries = 100, 311 if DEVICE == "cpu" else 511  # whole tiles and an odd one
    last = (queries - 1) // 128
    made, dim = engine(engine_name), 64 if engine_name == "fa4" else 16
    q, k, v = tensors(prefix, queries, 4, 2, dim, torch.bfloat16 if engine_name == "fa4" else torch.float32, seed=3)
    layout, patterns = TokenLayout(items=ITEMS, length=len(k), device=DEVICE), [head_pattern(RECIPES[name])] * 4
    _, want, plan = sparse_prefill(q, k, v, layout=layout, patterns=patterns, scale=SCALE, engine=made)
    out, lse = torch.full_like(q, float("nan")), torch.full((4, queries), float("nan"), device=DEVICE)
    for group in plan.groups:
        made.attend(q, k, v, None, sampled(group, (0, last)), SCALE, out, lse)
    rows = [*range(128), *range(128 * last, queries)]
    torch.testing.assert_close(lse[:, rows], want.T[:, rows], rtol=1e-5, atol=1e-5)
