"""`auto` in a server: what a request's heads chose is kept over its chunks, and settings that ask for it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mm_sglang import auto as module
from mm_sglang.auto import AutoHeads
from mm_sglang.config import SparseConfig
from mm_sglang.kernels.choosing import Choice
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import AShape, Auto, Dense, VerticalSlash, head_pattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.metrics import Metrics

REFERENCE = engine("reference")
PATTERNS = (Auto(density=0.3), Dense(), Auto(density=0.3), Auto(density=0.5))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """(keys, density) of every choice; head 0 takes a_shape, the others vertical_slash."""
    calls: list[tuple[int, float]] = []

    def choose(q: torch.Tensor, *_: Any, layout: TokenLayout, density: float, **__: Any) -> Choice:
        calls.append((layout.length, density))
        recipes = (AShape(local=100), *[VerticalSlash(columns=50, slashes=64)] * 3)
        return Choice(recipes=recipes, recall=(1.0,) * 4, density=(density,) * 4)

    monkeypatch.setattr(module, "choose", choose)
    return calls


def recipes(heads: AutoHeads, rid: str, prefix: int, queries: int, patterns: Any = PATTERNS, layer: int = 0) -> Any:
    q, k = torch.zeros(queries, 4, 16), torch.zeros(prefix + queries, 2, 16)
    layout = TokenLayout(items=(), length=prefix + queries)
    return heads.recipes(rid, layer, patterns, q, k, k, slots=None, layout=layout, scale=0.25)


def test_a_choice_holds_until_the_keys_are_fourfold(asked: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    heads = AutoHeads(REFERENCE, Metrics(on=False))
    with caplog.at_level(logging.INFO):
        first = recipes(heads, "a", 0, 1000)
        assert asked == [(1000, 0.3), (1000, 0.5)] and isinstance(first[0], AShape) and first[1] == Dense()
        second = recipes(heads, "a", 1000, 1000)
    assert len(asked) == 2 and [type(p) for p in second] == [type(p) for p in first]
    assert second[0].local > first[0].local and second[2].columns == 2 * first[2].columns
    recipes(heads, "a", 2000, 2000)
    assert asked[2:] == [(4000, 0.3), (4000, 0.5)]
    assert [r.getMessage() for r in caplog.records] == [
        "mm_sparse: auto: layer 0 chose, said once: 2 vertical_slash, 1 a_shape"
    ]


def test_a_limit_on_keys_makes_the_share_smaller_in_long_prompts(asked: list[Any]) -> None:
    auto = Auto(density=0.5, keys=1000)
    assert auto.share(0, 4000) == 0.5 and auto.share(6000, 10_000) == 1000 / 8000
    assert auto.scaled(2) == Auto(density=0.99, keys=2000) and auto.scaled(0.01).keys == 128
    heads = AutoHeads(REFERENCE, Metrics(on=False))
    recipes(heads, "a", 0, 4000, [auto] * 4)
    first = recipes(heads, "a", 4000, 4000, [auto] * 4)  # sees 6000 keys in the mean: a third of the share at first
    plain = recipes(heads, "b", 0, 4000, [Auto(density=0.5)] * 4)
    later = recipes(heads, "b", 4000, 4000, [Auto(density=0.5)] * 4)
    assert asked == [(4000, 0.5), (4000, 0.5)] and plain[2] == VerticalSlash(columns=50, slashes=64)
    assert later[2] == VerticalSlash(columns=100, slashes=192)
    assert first[2] == VerticalSlash(columns=100, slashes=192).scaled(1 / 3)
    recipes(heads, "a", 8000, 8000, [auto] * 4)
    assert asked[-1] == (16_000, 1000 / 12_000)


def test_requests_and_layers_choose_for_themselves(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUESTS", 2)
    heads = AutoHeads(REFERENCE, Metrics(on=False))
    for rid, layer in (("a", 0), ("a", 1), ("b", 0)):
        recipes(heads, rid, 0, 1000, PATTERNS[:1] * 4, layer)
    assert len(asked) == 3
    recipes(heads, "a", 0, 1000, PATTERNS[:1] * 4)  # another prompt under an old name, or one that starts again
    recipes(heads, "c", 0, 1000, PATTERNS[:1] * 4)
    assert len(asked) == 5 and list(heads.held) == ["a", "c"]
    recipes(heads, "a", 1000, 500, [PATTERNS[0].scaled(2)] * 4)  # the guard has raised it
    assert asked[-1] == (1500, 0.6)


def test_without_auto_nothing_is_held() -> None:
    heads, patterns = AutoHeads(REFERENCE, Metrics(on=False)), (Dense(), AShape())
    assert heads.recipes("a", 0, patterns, *[torch.zeros(0)] * 3, slots=None, layout=None, scale=1.0) is patterns  # type: ignore[arg-type]
    assert not heads.held


def test_chunks_of_a_prompt_are_prefilled_with_what_was_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1200, h, 16, generator=generator) for h in (4, 2, 2))
    heads, done = AutoHeads(REFERENCE, Metrics(on=False)), 0
    for end in (500, 1200):
        layout = TokenLayout(items=(), length=end)
        given = {"layout": layout, "scale": 0.25}
        patterns = heads.recipes("a", 0, [Auto(density=0.5, residual=True)] * 4, q[done:end], k[:end], v[:end],
                                 slots=None, **given)  # type: ignore[arg-type]  # fmt: skip
        assert all(p.residual for p in patterns)
        out, _, _ = sparse_prefill(
            q[done:end], k[:end], v[:end], layout=layout, patterns=patterns, scale=0.25, engine=REFERENCE
        )
        assert out.isfinite().all()
        done = end


def test_settings_may_say_auto_anywhere() -> None:
    config = SparseConfig.from_mapping(
        {"default": {"pattern": "auto", "density": 0.2}, "layers": {1: {"heads": {0: {"pattern": "auto"}}}}}
    )
    assert config.patterns(0, 2) == (Auto(density=0.2),) * 2
    assert config.patterns(1, 2) == (Auto(density=0.1), Auto(density=0.2))
    assert head_pattern(Auto(density=0.3).to_dict()) == Auto(density=0.3)


@pytest.mark.parametrize(
    "recipe, message",
    [
        ({"pattern": "auto", "density": 1.5}, "auto: density=1.5: needs a share between 0 and 1"),
        ({"pattern": "auto", "density": True}, "auto: density=True: needs a share"),
        ({"pattern": "auto", "keys": 100}, "auto: keys=100: needs a number of keys from 128"),
        ({"pattern": "auto", "keys": 1e4}, "auto: keys=10000.0: needs a number"),
        ({"pattern": "auto", "recall": 0.9}, "pattern auto: unknown key 'recall'"),
        ({"pattern": "auto", "boundary": "q"}, "part text: auto: needs no boundary, it chooses one itself"),
    ],
)
def test_bad_settings_are_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_pattern(recipe)
