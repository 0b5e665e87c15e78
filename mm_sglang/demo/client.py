"""Greedy chat completions through SGLang's OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Part = tuple[str, str | Path]  # ("text", words), ("image", png) or ("video", mp4), in the order they are shown


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Token ids of the answer, and how many prompt tokens there were, the ones found in the radix cache among them."""

    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Text of the answer, seconds from the request to its first token, and how many prompt tokens there were."""

    text: str
    first_token_s: float
    prompt_tokens: int


def ask(url: str, parts: Sequence[Part], tokens: int) -> Answer:
    """Ask for exactly `tokens` tokens; media go as data URLs. Raises openai's errors (BadRequestError for HTTP 400)."""
    answer = _create(
        url, parts, max_tokens=tokens, extra_body={"return_token_ids": True, "ignore_eos": True}
    ).model_dump()
    details = answer["usage"].get("prompt_tokens_details") or {}
    return Answer(
        tokens=answer["choices"][0]["response_token_ids"],
        prompt_tokens=answer["usage"]["prompt_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
    )


def reply(url: str, parts: Sequence[Part], tokens: int) -> Reply:
    """Ask for an answer of at most `tokens` tokens, which the model may end; otherwise as `ask`."""
    text, first, prompt_tokens = "", 0.0, 0
    begin = time.perf_counter()
    for event in _create(url, parts, max_tokens=tokens, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            if choice.delta.content or choice.finish_reason:  # an answer that ends at once has no content
                first = first or time.perf_counter() - begin
                text += choice.delta.content or ""
        if event.usage is not None:
            prompt_tokens = event.usage.prompt_tokens
    return Reply(text=text.strip(), first_token_s=first, prompt_tokens=prompt_tokens)


def _create(url: str, parts: Sequence[Part], **options: Any) -> Any:
    import openai

    content: list[dict[str, object]] = []
    for kind, value in parts:
        if kind == "text":
            content.append({"type": "text", "text": str(value)})
        else:
            data = base64.b64encode(Path(value).read_bytes()).decode()
            mime = {"image": "image/png", "video": "video/mp4"}[kind]
            content.append({"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{mime};base64,{data}"}})
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600)
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="default", messages=messages, temperature=0, **options)
