"""Pooled residual: one softmax over the attended keys and the mean keys of the tiles left out, written out in fp64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported

from recipes import ITEMS, PATTERNS, RECIPES, listed_once, relative_error

from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import attended, tile_map
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import head_pattern
from mm_sglang.kernels.plan import PAD, TILE, HeadGroup, Plan
from mm_sglang.kernels.prefill import sparse_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.3
NAMES = ["a_shape", "vertical_slash", "grid_frame", "block_topk", "q_slash", "2d_mixed"]


def softmax_with_means(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, head: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of one head in fp64, its q [Nq, D] and k, v [Nk, D] given; groups in order, the last one counts."""
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    lse = torch.zeros(len(q), dtype=torch.float64)
    mask = attended(plan, head)
    for group in plan.groups:
        row = next((r for r, heads in enumerate(group.heads) if head in heads), None)
        if row is None:
            continue
        q_pos, k_pos = group.q_positions()[row].cpu().long(), group.k_positions()[row].cpu().long()
        computed = tile_map(group, head)
        for m in range(group.query_tiles):
            at = q_pos[m * TILE : (m + 1) * TILE]
            at = at[at != PAD]
            left_out = _left_out(group, k_pos, computed[m], int(at.min())) if len(at) else []
            for position in at.tolist():
                i = position - plan.prefix
                seen = mask[i]
                logits = [k[seen] @ q[i] * scale]
                values = [v[seen]]
                for keys in left_out:
                    logits.append((k[keys].mean(0) @ q[i] * scale)[None] + torch.log(torch.tensor(float(len(keys)))))
                    values.append(v[keys].mean(0)[None])
                joined = torch.cat(logits)
                out[i], lse[i] = joined.softmax(0) @ torch.cat(values), joined.logsumexp(0)
    return out, lse


def _left_out(group: HeadGroup, k_pos: torch.Tensor, computed: torch.Tensor, first: int) -> list[torch.Tensor]:
    """Keys of each tile that is not computed and that query `first`, the earliest of its tile, may see whole."""
    tiles = [k_pos[n * TILE : (n + 1) * TILE] for n in range(group.key_tiles) if not computed[n]]
    tiles = [keys[keys != PAD] for keys in tiles]
    return [keys for keys in tiles if len(keys) and int(keys.max()) <= first]


@pytest.mark.parametrize("prefix, queries", [(0, 611), (400, 150)])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["reference", "triton", pytest.param("fa4", marks=pytest.mark.gpu)])
def test_residual_is_one_softmax_with_the_means(kind: str, name: str, prefix: int, queries: int) -> None:
    dim, dtype = (128, torch.bfloat16) if kind == "fa4" else (16, torch.float32)
    scale = 1.2 * dim**-0.5  # weights so flat that what is left out matters
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(queries, 4, dim, generator=generator).to(dtype)
    k, v = torch.randn(2, prefix + queries, 2, dim, generator=generator).to(dtype)
    k += 1.0  # means that matter
    device = "cpu" if kind == "reference" else DEVICE
    out, lse, plan = sparse_prefill(
        q.to(device), k.to(device), v.to(device), layout=TokenLayout(items=ITEMS, length=len(k), device=device),
        patterns=[head_pattern(RECIPES[name] | {"residual": True})] * 3 + [head_pattern({"pattern": "dense"})],
        scale=scale, engine=engine(kind),
    )  # fmt: skip
    plan, changed = listed_once(plan), 0
    for head in range(4):
        own, keys, values = (x[:, h].double() for x, h in ((q, head), (k, head // 2), (v, head // 2)))
        want, want_lse = softmax_with_means(own, keys, values, plan, head, scale)
        bound = 1e-5 if dtype == torch.float32 else 4e-3  # bf16 rounds the means once and the output twice
        assert relative_error(out[:, head].cpu(), want) <= bound, head
        assert relative_error(lse[:, head].cpu(), want_lse) <= bound, head
        logits = (own @ keys.T * scale).masked_fill(~attended(plan, head), float("-inf"))
        changed += relative_error(logits.softmax(-1) @ values, want) > 4 * bound
    if prefix == 0:  # behind a long prefix, some recipes leave no whole tile out of so short a prompt
        assert changed == 3  # the residual did something, and left the dense head alone


def test_a_residual_over_a_paged_pool() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(300, 2, 16, generator=generator).to(DEVICE)
    k, v = torch.randn(2, 500, 1, 16, generator=generator).to(DEVICE)
    slots = torch.randperm(700, generator=generator)[:500].int().to(DEVICE)
    pools = torch.full((2, 700, 1, 16), float("nan"), device=DEVICE)
    pools[:, slots.long()] = torch.stack((k, v))
    layout = TokenLayout(items=ITEMS, length=500, device=DEVICE)
    patterns = [head_pattern(PATTERNS["a_shape"] | {"residual": True})] * 2
    results = [
        sparse_prefill(q, a, b, layout=layout, patterns=patterns, scale=SCALE, engine=engine("triton"), slots=s)
        for a, b, s in ((k, v, None), (pools[0], pools[1], slots))
    ]
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("recipe", [{"pattern": "grid", "residual": 1}, {"pattern": "dense", "residual": "yes"}])
def test_residual_needs_true_or_false(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"residual=.*: needs true or false"):
        head_pattern(recipe)


def test_residual_belongs_to_the_head_and_not_to_its_parts() -> None:
    parts = {"text": {"pattern": "dense", "residual": True}, "vision": {"pattern": "dense"}}
    with pytest.raises(ValueError, match="part text: residual=True: needs it beside 'boundary'"):
        head_pattern({"boundary": "q", "parts": parts})
    made = head_pattern({"boundary": "q", "pattern": "dense", "residual": True})
    assert made.residual and head_pattern(made.to_dict()) == made
