"""Correctness before any timing: our engines, sampled rows against fp32, fresh random inputs, poisoned outputs.

The kernel tests check patterns against brute force at small sizes; this checks that what is about to be timed is right
on this machine: odd lengths, a chunk with a prefix, every pattern and boundary, both engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks.kernels import rows
from benchmarks.kernels.cases import MIX, PAPER_SLASH, Recipe, fitted
from benchmarks.kernels.measure import first_line
from benchmarks.kernels.planted import KINDS, layout_of, planted
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.patterns import head_pattern
from mm_sglang.kernels.prefill import sparse_prefill

ALLOWED = 2.0  # times the error of torch's own attention on the same rows, in the same dtype

# inputs, recipe by name; what `fitted` has comes on top
RECIPES: dict[str, tuple[str, Recipe]] = {
    "dense": ("random", {"pattern": "dense"}),
    "a_shape": ("random", {"pattern": "a_shape", "sink": 100, "local": 700}),
    "vertical_slash": ("random", PAPER_SLASH),
    "vertical_slash coverage": ("columns", {"pattern": "vertical_slash", "coverage": 0.9}),
    "grid auto, both lines": ("grid", {"pattern": "grid", "stride": "auto", "lines": 4}),
    "grid row": ("mix", {"pattern": "grid", "stride": "row", "lines": 14, "horizontal": False}),
    "block_topk antidiagonal": ("random", {"pattern": "block_topk", "blocks": 9, "score": "antidiagonal"}),
    "block_topk coverage": ("blocks", {"pattern": "block_topk", "blocks": 40, "coverage": 0.9}),
    "vertical_slash k": ("boundary", {"boundary": "k", "pattern": "vertical_slash", "columns": 300, "slashes": 500}),
    "vertical_slash q": ("boundary", {"boundary": "q", "pattern": "vertical_slash", "columns": 300, "slashes": 500}),
    "block_topk 2d": ("boundary", {"boundary": "2d", "pattern": "block_topk", "blocks": 5}),
}
# tokens, of which prefix, query heads, KV heads
SHAPES = ((6347, 0, 28, 4), (9001, 2500, 32, 8), (131, 0, 7, 1))


@dataclass(frozen=True, kw_only=True)
class Result:
    """One check: the worst head's error over torch's, and why it failed, or None."""

    engine: str
    what: str
    tokens: int
    prefix: int
    heads: str
    seed: int
    ratio: float
    failure: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def poisoned() -> Iterator[None]:
    """Floating-point memory comes filled with NaN, so that what a kernel leaves unwritten shows."""

    def fill(make: Any) -> Any:
        def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
            made: torch.Tensor = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return poison

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, fill(getattr(owner, name))))
        yield


def check_all(engines: list[Engine], device: torch.device, seed: int, quick: bool = False) -> list[Result]:
    """Every engine on every recipe; `quick` leaves out all shapes but the first."""
    fit = {kind: (kind, fitted(kind, 6347)) for kind in KINDS}
    work = [
        (engine, name, kind, recipe, shape)
        for shape in SHAPES[: 1 if quick else None]
        for name, (kind, recipe) in {**fit, **RECIPES, "mix": ("mix", None)}.items()
        for engine in engines
    ]
    results = []
    for number, (engine, name, kind, recipe, shape) in enumerate(tqdm(work, desc="checks", unit="check")):
        results.append(_check(engine, name, kind, recipe, shape, device, seed + number))
    return results


def _check(
    engine: Engine, name: str, kind: str, recipe: Recipe | None, shape: tuple[int, int, int, int],
    device: torch.device, seed: int,
) -> Result:  # fmt: skip
    tokens, prefix, q_heads, kv_heads = shape
    ratio, failure = rows.WRONG, None
    try:
        ratio, failure = _ratio(engine, kind, recipe, shape, device, seed)
    except Exception as error:  # a check that can't run has failed; the others still say what works
        failure = first_line(error)
    return Result(
        engine=engine.name, what=name, tokens=tokens, prefix=prefix, heads=f"{q_heads}:{kv_heads}", seed=seed,
        ratio=ratio, failure=failure,
    )  # fmt: skip


def _ratio(
    engine: Engine, kind: str, recipe: Recipe | None, shape: tuple[int, int, int, int], device: torch.device, seed: int
) -> tuple[float, str | None]:
    tokens, prefix, q_heads, kv_heads = shape
    q, k, v, _ = planted(kind, tokens=tokens, q_heads=q_heads, kv_heads=kv_heads, seed=seed, device=device)
    q, scale = q[prefix:], q.shape[2] ** -0.5
    patterns = MIX.patterns(tokens, q_heads, kv_heads) if recipe is None else [head_pattern(recipe)] * q_heads
    with poisoned():
        out, lse, plan = sparse_prefill(
            q, k, v, layout=layout_of(kind, tokens, device), patterns=patterns, scale=scale, engine=engine
        )
        positions = rows.sample(tokens - prefix, prefix, 64, seed, late=False).to(device)
        seen = rows.look(plan, positions)
    result = rows.exactness(q, k, v, out, positions, seen.masks, scale)
    if not (out.isfinite().all() and lse.isfinite().all()):
        return result.ratio, "output or lse is not finite somewhere"
    if seen.future:
        return result.ratio, f"{seen.future} keys of full tiles come after their query"
    return result.ratio, f"error {result.ratio:.2f} x torch's" if result.ratio > ALLOWED else None
