"""Questions to a server of tests/e2e."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from assets import Assets
from recipes import TOKENS

from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server

# In a server's environment: its processes share what the first one imported, see start/sitecustomize.py. CUDA can't.
FORKED = {} if torch.cuda.is_available() else {"MM_SGLANG_FORKED": "1"}


def ask_all_at_once(server: Server, assets: Assets) -> dict[str, list[int]]:
    """Tokens of the answer to every prompt, all of them asked at once of a server whose cache is empty."""
    server.flush_cache()
    with ThreadPoolExecutor(len(assets.prompts)) as pool:
        answers = pool.map(lambda parts: ask(server.url, parts, TOKENS), assets.prompts.values())
        return {name: answer.tokens for name, answer in zip(assets.prompts, answers, strict=True)}
