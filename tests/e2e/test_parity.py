"""Greedy tokens of real servers: mm_sparse with budgets that cover everything = the dense backend = transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking import FORKED, ask_all_at_once
from assets import Assets
from recipes import COVERING, TOKENS

from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.serve import server_command
from mm_sglang.trace import read_trace

pytestmark = pytest.mark.e2e

PART_DENSE = COVERING | {"min_tokens": 300, "dense_layers": [0]}  # some requests and one layer go to the dense backend


@dataclass(frozen=True)
class Case:
    architecture: str
    settings: dict[str, Any] | None  # None: the dense backend
    flags: tuple[str, ...]


CASES = {
    "dense": Case("qwen2_5_vl", None, ("--chunked-prefill-size", "2048")),
    "chunk 64, page 1": Case("qwen2_5_vl", COVERING, ("--chunked-prefill-size", "64")),
    "chunk 2048, page 16, mixed chunks, part dense": Case(
        "qwen2_5_vl", PART_DENSE, ("--chunked-prefill-size", "2048", "--page-size", "16", "--enable-mixed-chunk")
    ),
    "chunk 64, page 16, TP 2": Case(
        "qwen2_5_vl", COVERING, ("--chunked-prefill-size", "64", "--page-size", "16", "--tp", "2")
    ),
    "chunk 2048, page 1, TP 2, no radix cache": Case(
        "qwen2_5_vl", COVERING, ("--chunked-prefill-size", "2048", "--tp", "2", "--disable-radix-cache")
    ),
    "Qwen3-VL, dense": Case("qwen3_vl", None, ("--chunked-prefill-size", "2048")),
    "Qwen3-VL, chunk 64, mixed chunks": Case(
        "qwen3_vl", COVERING, ("--chunked-prefill-size", "64", "--enable-mixed-chunk")
    ),
}
SPAWNED = "chunk 64, page 1"  # its processes are started as SGLang starts them


@dataclass(frozen=True)
class Running:
    name: str
    case: Case
    server: Server
    trace: Path
    wanted: dict[str, list[int]]


@pytest.fixture(scope="module", params=CASES)
def running(
    request: pytest.FixtureRequest, assets: Assets, wanted: dict[str, dict[str, list[int]]]
) -> Iterator[Running]:
    case, slug = CASES[request.param], "".join(c if c.isalnum() else "-" for c in request.param)
    trace = assets.folder / f"trace-{slug}"
    extra = [
        "--dtype",
        "float32",
        "--max-total-tokens",
        "16384",
        "--enable-cache-report",
        "--sleep-on-idle",
        *case.flags,
    ]
    if case.settings is None:
        extra += ["--attention-backend", "torch_native"]
    config, model = None, assets.models[case.architecture]
    if case.settings is not None:
        settings = case.settings | {"trace": {"dir": str(trace)}}
        if case.architecture == "qwen3_vl":  # settings travel as a file's path here, and inline in the other cases
            config = str(assets.folder / f"{slug}.yaml")
            Path(config).write_text(yaml.safe_dump(settings))
        else:
            extra += ["--json-model-override-args", dumps({"mm_sparse": settings})]
    command, environment = server_command(str(model), config=config, extra=extra, cores=os.cpu_count() or 1)
    if request.param != SPAWNED:
        environment |= FORKED
    with Server(command, environment, assets.folder / f"{slug}.log") as server:
        yield Running(request.param, case, server, trace, wanted[case.architecture])


@pytest.mark.parametrize("prompt", ["text", "image", "video", "mixed"])
def test_greedy_tokens_equal_transformers(running: Running, assets: Assets, prompt: str) -> None:
    assert ask(running.server.url, assets.prompts[prompt], TOKENS).tokens == running.wanted[prompt]


def test_a_repeated_prompt_has_a_prefix_and_the_same_tokens(running: Running, assets: Assets) -> None:
    ask(running.server.url, assets.prompts["video"], 1)
    again = ask(running.server.url, assets.prompts["video"], TOKENS)
    assert again.tokens == running.wanted["video"]
    expected = 0 if "--disable-radix-cache" in running.case.flags else again.prompt_tokens - 17
    assert again.cached_tokens >= expected  # all but the last token, or the last page of 16


def test_a_longer_question_starts_in_the_middle_of_the_cache(running: Running, assets: Assets) -> None:
    """A radix hit that ends inside the prompt: the suffix is a chunk whose prefix was computed by another request.

    It is longer than text_tail; a shorter one is all question and left to the dense backend.
    """
    longer = [*assets.prompts["video"], ("text", " and what is not? tell me all of it." * 12)]
    first = ask(running.server.url, longer, TOKENS)
    running.server.flush_cache()
    assert ask(running.server.url, longer, TOKENS).tokens == first.tokens


def test_four_requests_at_once(running: Running, assets: Assets) -> None:
    assert ask_all_at_once(running.server, assets) == running.wanted


def test_the_sparse_path_ran(running: Running) -> None:
    """Last of a server: its trace shows that every pattern ran, in chunks of the size asked for, on every rank."""
    if running.case.settings is None:
        assert not running.trace.exists()
        return
    assert "pixels travel as uint8" in running.server.log.read_text()
    size = int(running.case.flags[running.case.flags.index("--chunked-prefill-size") + 1])
    ranks = 2 if "--tp" in running.case.flags else 1
    kinds, heads = set(), set()
    for rank in range(ranks):
        lines = list(read_trace(running.trace, rank))
        assert lines and max(line["queries"] for line in lines) <= size
        assert any(line["prefix"] > 0 for line in lines) == ("--disable-radix-cache" not in running.case.flags)
        kinds |= {group["pattern"]["pattern"] for line in lines for group in line["groups"]}
        heads |= {head for line in lines for group in line["groups"] for head in group["heads"]}
        dense_layers = running.case.settings.get("dense_layers", [])
        assert {line["layer"] for line in lines} == set(range(4)) - set(dense_layers)
    assert kinds == {"dense", "a_shape", "vertical_slash", "grid", "text_tail"}
    assert heads == set(range(8))
