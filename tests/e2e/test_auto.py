"""A real server whose heads choose for themselves, over the chunks of a prompt, on two tensor-parallel ranks."""

from __future__ import annotations

import json

import pytest
from asking import FORKED
from assets import Assets

from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.serve import server_command
from mm_sglang.trace import read_trace

pytestmark = pytest.mark.e2e


RANKS = 2


def test_heads_choose_once_and_keep_to_it(assets: Assets) -> None:
    trace = assets.folder / "trace-auto"
    settings = {"default": {"pattern": "auto", "density": 0.6}, "min_tokens": 1, "trace": {"dir": str(trace)}}
    extra = ["--dtype", "float32", "--max-total-tokens", "16384", "--chunked-prefill-size", "320"]
    extra += ["--json-model-override-args", json.dumps({"mm_sparse": settings}), "--tp-size", str(RANKS)]
    command, environment = server_command(str(assets.models["qwen2_5_vl"]), config=None, extra=extra, cores=RANKS)
    log = assets.folder / "auto.log"
    with Server(command, environment | FORKED, log) as server:
        server.flush_cache()
        answer = ask(server.url, assets.prompts["mixed"], 4)
    assert len(answer.tokens) == 4
    said = log.read_text()
    assert all(f"auto: layer {layer} chose, said once" in said for layer in range(4))
    for rank in range(RANKS):
        lines = list(read_trace(trace, rank))
        rid = max(lines, key=lambda line: int(line["prefix"]))["rid"]
        for layer in range(4):
            chunks = [line for line in lines if (line["rid"], line["layer"]) == (rid, layer)]
            assert len(chunks) > 1 and sum(line["queries"] for line in chunks) == answer.prompt_tokens
            first = chunks[0]["queries"]
            kept = [line for line in chunks if line["prefix"] + line["queries"] < 4 * first]
            families = {
                tuple(
                    sorted(
                        (h, kind)
                        for g in line["groups"]
                        if (kind := g["pattern"].get("pattern", "boundary")) not in ("text_tail", "dense")
                        for h in g["heads"]
                    )
                )
                for line in kept
            }
            assert len(kept) > 1 and len(families) == 1 and "auto" not in str(families)
