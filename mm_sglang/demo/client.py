"""One greedy chat completion through SGLang's OpenAI-compatible endpoint."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Part = tuple[str, str | Path]  # ("text", words), ("image", png) or ("video", mp4), in the order they are shown


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Token ids of the answer, and how many prompt tokens there were, the ones found in the radix cache among them."""

    tokens: list[int]
    prompt_tokens: int
    cached_tokens: int


def ask(url: str, parts: Sequence[Part], tokens: int) -> Answer:
    """Ask for exactly `tokens` tokens; media go as data URLs. Raises openai's errors (BadRequestError for HTTP 400)."""
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
    answer = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_tokens=tokens,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    ).model_dump()
    details = answer["usage"].get("prompt_tokens_details") or {}
    return Answer(
        tokens=answer["choices"][0]["response_token_ids"],
        prompt_tokens=answer["usage"]["prompt_tokens"],
        cached_tokens=details.get("cached_tokens") or 0,
    )
