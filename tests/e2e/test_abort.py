"""An abort in the middle of a chunked sparse prefill gives every page back, and the server goes on."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import requests
import yaml
from asking import FORKED
from assets import Assets

from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.serve import server_command

pytestmark = pytest.mark.e2e
LONG = "the quick brown fox jumps over the lazy dog. " * 600  # more than a thousand chunks of 16 tokens


def used_tokens(url: str) -> int:
    """Tokens of the KV pool in use, as the scheduler counts them."""
    loads = requests.get(url + "/v1/loads", timeout=10).json()["loads"]
    return int(sum(load["num_used_tokens"] for load in loads))


def sparse_tokens(url: str) -> float:
    with urllib.request.urlopen(url + "/metrics") as answer:
        found = re.search(
            r'^mm_sglang:prefill_tokens_total\{mode="sparse".*\} (\S+)$', answer.read().decode(), re.MULTILINE
        )
    return float(found[1]) if found else 0.0


def has_prefilled(url: str, tokens: float) -> bool:
    return sparse_tokens(url) >= tokens


def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_aborts_at_any_chunk_give_all_pages_back(assets: Assets) -> None:
    config = assets.folder / "abort.yaml"
    recipe = {"pattern": "a_shape", "sink": 16, "local": 64}
    # chunks of 16 tokens of text would be all question, and dense
    config.write_text(yaml.safe_dump({"default": recipe, "min_tokens": 64, "text_tail": 0}))
    command, environment = server_command(
        str(assets.models["qwen2_5_vl"]), config=str(config), cores=2,
        extra=[
            "--max-total-tokens", "32768", "--chunked-prefill-size", "16", "--page-size", "16", "--disable-radix-cache",
            "--enable-metrics",
        ],
    )  # fmt: skip
    with Server(command, environment | FORKED, assets.folder / "abort.log") as server:
        first = ask(server.url, assets.prompts["video"], 4)
        wait_until(lambda: used_tokens(server.url) == 0)
        held: list[int] = []
        for number, chunks in enumerate((3, 40, 150)):
            before, rid = sparse_tokens(server.url), f"long-{number}"

            def send(rid: str = rid) -> None:
                body: dict[str, Any] = {"text": LONG, "rid": rid, "sampling_params": {"max_new_tokens": 4}}
                requests.post(server.url + "/generate", json=body, timeout=120)

            sender = threading.Thread(target=send)
            sender.start()
            wait_until(partial(has_prefilled, server.url, before + 16 * chunks))
            held.append(used_tokens(server.url))
            requests.post(server.url + "/abort_request", json={"rid": rid}, timeout=10).raise_for_status()
            sender.join(60)
            assert not sender.is_alive()
            wait_until(lambda: used_tokens(server.url) == 0)  # every page is back
            stopped = sparse_tokens(server.url) - before
            assert 0 < stopped < 10_000, "the prompt was not cut off"
        assert min(held) > 0  # there was something to give back
        assert ask(server.url, assets.prompts["video"], 4) == first
