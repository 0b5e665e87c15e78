"""Prefills spread over two ranks of a real server: greedy tokens of every kind of prompt = transformers'.

That selections under real budgets don't depend on the number of ranks is tests/context_parallel/test_attention.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import pytest
from asking import FORKED, ask_all_at_once
from assets import Assets
from recipes import COVERING, TOKENS

from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.serve import server_command
from mm_sglang.trace import read_trace

pytestmark = pytest.mark.e2e

RANKS = 2
# Under full budgets a recall of 1 is missed by rounding alone: which heads the guard raises is as arbitrary as can be,
# and the ranks have to agree.
WATCHED: dict[str, Any] = {"probe": {"every": 1}, "guard": {"coverage": 1 - 1e-9, "every": 1, "grow": 1}}
# name -> architecture, settings, options. Chunks of 300 are spread, the rest of a prompt after them may be too small.
CASES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "Qwen2.5-VL, stripes, page 16, part dense": (
        "qwen2_5_vl", COVERING | {"min_tokens": 350, "dense_layers": [0]} | WATCHED,
        ("--chunked-prefill-size", "2048", "--page-size", "16"),
    ),
    "Qwen3-VL, zigzag, chunk 304": (
        "qwen3_vl", COVERING, ("--chunked-prefill-size", "304", "--cp-strategy", "zigzag"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Running:
    server: Server
    trace: Path
    settings: dict[str, Any]
    wanted: dict[str, list[int]]


@pytest.fixture(scope="module", params=CASES)
def running(
    request: pytest.FixtureRequest, assets: Assets, wanted: dict[str, dict[str, list[int]]]
) -> Iterator[Running]:
    architecture, settings, flags = CASES[request.param]
    trace = assets.folder / f"trace-cp-{architecture}"
    extra = ["--dtype", "float32", "--max-total-tokens", "16384", "--enable-cache-report", *flags]
    extra += ["--json-model-override-args", dumps({"mm_sparse": settings | {"trace": {"dir": str(trace)}}})]
    command, environment = server_command(
        str(assets.models[architecture]), config=None, extra=extra, cores=RANKS, context_parallel=RANKS
    )
    with Server(command, environment | FORKED, assets.folder / f"cp-{architecture}.log") as server:
        yield Running(server, trace, settings, wanted[architecture])


@pytest.mark.parametrize("prompt", ["text", "image", "images", "video", "mixed"])
def test_greedy_tokens_equal_transformers(running: Running, assets: Assets, prompt: str) -> None:
    assert ask(running.server.url, assets.prompts[prompt], TOKENS).tokens == running.wanted[prompt]


def test_a_radix_hit_continues_what_all_ranks_wrote(running: Running, assets: Assets) -> None:
    """The suffix is long enough to be spread itself; its prefix came from blocks of both ranks."""
    longer = [*assets.prompts["video"], ("text", " and what is not? tell me all of it." * 12)]
    running.server.flush_cache()
    whole = ask(running.server.url, longer, TOKENS)
    running.server.flush_cache()
    ask(running.server.url, assets.prompts["video"], 1)
    again = ask(running.server.url, longer, TOKENS)
    assert again.tokens == whole.tokens
    assert again.cached_tokens > 300 and again.prompt_tokens - again.cached_tokens > RANKS * 128


def test_all_requests_at_once(running: Running, assets: Assets) -> None:
    assert ask_all_at_once(running.server, assets) == running.wanted


def test_both_ranks_planned_the_same_and_said_what_they_do(running: Running) -> None:
    """Last of a server."""
    first, second = (list(read_trace(running.trace, rank)) for rank in range(RANKS))
    assert first == second and len(first) > 20
    assert {line["layer"] for line in first} == set(range(4)) - set(running.settings.get("dense_layers", []))
    log = running.server.log.read_text(errors="replace")
    if "guard" in running.settings:
        raised = [sorted(re.findall(rf"ATTN_CP{rank} .*guard: (layer .*)", log)) for rank in range(RANKS)]
        assert raised[0] and raised[0] == raised[1]
    assert log.count("prefills spread over 2 ranks") == RANKS
    assert log.count("context parallelism, said once") == RANKS
