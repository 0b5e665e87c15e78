"""mm_sparse on a GPU: real servers, real media; budgets that cover everything give the dense backend's answers."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml
from assets import Assets

from mm_sglang.check import checks
from mm_sglang.demo.server import Server
from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.kernels.engines import ENGINES
from mm_sglang.serve import server_command, sglang_script

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]

MUCH = 10**6
COVERING: dict[str, Any] = {
    "default": {"pattern": "vertical_slash", "columns": MUCH, "slashes": MUCH},
    "layers": {
        "1": {"default": {"pattern": "grid", "lines": MUCH}, "heads": {"2": {"pattern": "dense"}}},
        "2": {
            "default": {"pattern": "a_shape", "local": MUCH},
            "heads": {"5": {"pattern": "block_topk", "blocks": MUCH}},
        },
        "3": {"default": {"pattern": "vertical_slash", "columns": MUCH, "slashes": MUCH, "boundary": "2d"}},
    },
    "min_tokens": 200,  # short prompts, and parts of batches, go to the dense side
}
FLAGS = (
    "--dtype",
    "bfloat16",
    "--mem-fraction-static",
    "0.5",  # of what is free at the start: the others start meanwhile, and --max-total-tokens bounds the pool
    "--max-total-tokens",
    "20000",
    "--cuda-graph-max-bs-decode",
    "8",
)


def context_parallel(ranks: int) -> tuple[str, ...]:
    """SGLang's own flags, as mm-sglang serve --context-parallel sets them."""
    return (
        "--tp-size", str(ranks), "--attn-cp-size", str(ranks), "--enable-prefill-cp", "--cp-strategy", "interleave",
        "--cuda-graph-backend-prefill", "disabled", "--mm-enable-dp-encoder",
    )  # fmt: skip


# architecture, sparse, ranks, flags; those with a dense server of the same sums in bf16 are compared with that one
SERVERS: dict[str, tuple[str, bool, int, tuple[str, ...]]] = {
    "dense": ("qwen2_5_vl", False, 1, ("--chunked-prefill-size", "2048")),
    "chunks of 256": ("qwen2_5_vl", True, 1, ("--chunked-prefill-size", "256", "--enable-mixed-chunk")),
    "pages of 128": ("qwen2_5_vl", True, 1, ("--chunked-prefill-size", "2048", "--page-size", "128")),
    "Qwen3-VL, dense": ("qwen3_vl", False, 1, ("--chunked-prefill-size", "2048")),
    "Qwen3-VL": ("qwen3_vl", True, 1, ("--chunked-prefill-size", "512")),
    "dense, 2 ranks": ("qwen2_5_vl", False, 2, ("--chunked-prefill-size", "2048", "--tp", "2")),
    "dense, 4 ranks": ("qwen2_5_vl", False, 4, ("--chunked-prefill-size", "2048", "--tp", "4")),
    "2 ranks": ("qwen2_5_vl", True, 2, ("--chunked-prefill-size", "512", "--tp", "2")),
    "4 ranks": ("qwen2_5_vl", True, 4, ("--chunked-prefill-size", "512", "--tp", "4")),
    "context over 2": ("qwen2_5_vl", True, 2, ("--chunked-prefill-size", "512", *context_parallel(2))),
    "context over 4": ("qwen2_5_vl", True, 4, ("--chunked-prefill-size", "2048", *context_parallel(4))),
}
DENSE = {"Qwen3-VL": "Qwen3-VL, dense", "2 ranks": "dense, 2 ranks", "4 ranks": "dense, 4 ranks"}
TOKENS = 6
Place = tuple[int, dict[str, float]]  # the token, and the likeliest ones' log probabilities


def servers() -> list[str]:
    """Those that there are GPUs for."""
    return [name for name, (_, _, ranks, _) in SERVERS.items() if ranks <= torch.cuda.device_count()]


@pytest.fixture(scope="module")
def answers(assets: Assets) -> Iterator[dict[str, dict[str, Any]]]:
    """server -> prompt -> the answer's tokens with their best log probabilities; all servers run at once.

    A server that failed stands there with nothing but {"failed": error}, so that the others are tested all the same.
    """
    config = assets.folder / "covering.yaml"
    config.write_text(yaml.safe_dump(COVERING))
    with ExitStack() as stack, ThreadPoolExecutor(len(SERVERS)) as pool:

        def run(name: str) -> dict[str, Any]:
            architecture, sparse, ranks, flags = SERVERS[name]
            model = str(assets.models[architecture])
            first = list(SERVERS).index(name) % (torch.cuda.device_count() - ranks + 1)
            extra = [*FLAGS, *flags, "--base-gpu-id", str(first)]
            if sparse:
                command, environment = server_command(model, config=str(config), extra=extra, cores=1)
            else:
                command, environment = [sglang_script(), "serve", model, "--attention-backend", "fa3", *extra], {}
            # the ranks of a server start at different times on GPUs that others fill meanwhile
            environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
            log = assets.folder / f"{name.replace(' ', '-').replace(',', '')}.log"
            try:
                server = stack.enter_context(Server(command, environment, log))
                with ThreadPoolExecutor(len(assets.prompts)) as prompts:  # a batch of all
                    answers = prompts.map(lambda parts: ask(server.url, parts), assets.prompts.values())
                    return dict(zip(assets.prompts, answers, strict=True))
            except (RuntimeError, requests.RequestException) as error:
                return {"failed": error}

        yield dict(zip(servers(), pool.map(run, servers()), strict=True))


def ask(url: str, parts: Any) -> list[Place]:
    """The greedy answer; some special tokens have no name, so the likeliest ones are those that have."""
    content: list[dict[str, Any]] = []
    for kind, value in parts:
        if kind == "text":
            content.append({"type": "text", "text": value})
        else:
            data = base64.b64encode(Path(value).read_bytes()).decode()
            mime = {"image": "image/png", "video": "video/mp4"}[kind]
            content.append({"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{data}"}})
    body: dict[str, Any] = {
        "model": "default", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0,
        "logprobs": True, "top_logprobs": 20, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    answer = requests.post(url + "/v1/chat/completions", json=body, timeout=300)
    answer.raise_for_status()
    choice = answer.json()["choices"][0]
    return [
        (token, {str(t["bytes"]) + t["token"]: t["logprob"] for t in place["top_logprobs"] if t["bytes"]})
        for token, place in zip(choice["response_token_ids"], choice["logprobs"]["content"], strict=True)
    ]


@pytest.mark.parametrize("prompt", ["text", "image", "images", "video", "mixed"])
@pytest.mark.parametrize("name", [name for name, (_, sparse, _, _) in SERVERS.items() if sparse])
def test_covering_budgets_answer_as_dense_does(name: str, prompt: str, answers: dict[str, dict[str, Any]]) -> None:
    """bf16 rounds two kernels differently, so log probabilities are compared, up to the first token that differs."""
    if name not in answers:
        pytest.skip(f"needs {SERVERS[name][2]} GPUs")
    got, dense = answers[name], answers[DENSE.get(name, "dense")]
    for found in (got, dense):
        if "failed" in found:
            pytest.fail(str(found["failed"]))
    got, dense = got[prompt], dense[prompt]
    assert len(got) == len(dense) == TOKENS
    for place, ((mine, a), (theirs, b)) in enumerate(zip(got, dense, strict=True)):
        common = set(a) & set(b)
        assert len(common) >= 3, (place, a, b)
        assert max(abs(a[t] - b[t]) for t in common) <= 0.15, (place, a, b)
        assert all(math.isfinite(x) for x in a.values())
        if mine != theirs:
            break  # a near tie, as just shown; from here on the prompts differ


def test_check_names_the_device_and_the_engine() -> None:
    rows = {what: fine for what, fine, _ in checks()}
    assert rows["device"]
    assert rows["engine fa4"] == (ENGINES["fa4"].missing() is None)


def test_a_model_the_kernels_do_not_fit_is_refused_at_start(tmp_path: Path) -> None:
    command, environment = server_command(
        str(make_tiny_model(tmp_path / "model", head_dim=32)), config=None, extra=FLAGS, cores=1
    )
    log = tmp_path / "refused.log"
    with pytest.raises(RuntimeError, match="the server ended with code"), Server(command, environment, log):
        pass
    assert "head_dim=32: needs one of (64, 128)" in log.read_text()
