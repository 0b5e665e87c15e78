"""The demo's questions about its video, asked of each server, and which answers are right."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_sglang.demo.client import Reply, reply
from mm_sglang.demo.server import Server

REQUESTS = 3  # at least, a server: the first one and the repeats that are timed
ANSWER_TOKENS = 16  # at most; a needle's answer is one


@dataclass(frozen=True, kw_only=True)
class Question:
    """`truth` is None where only whoever asks knows it."""

    text: str
    truth: str | None = None


def ask_in_turn(server: Server, video: Path, questions: Sequence[Question]) -> list[Reply]:
    """The answer to every question, then to the first ones again until there are REQUESTS of them.

    Each request finds an empty radix cache, so the server prefills the whole prompt for it.

    Raises:
        ValueError: what the server refuses (HTTP 400), which is the user's video.
    """
    import openai

    replies = []
    for number in range(max(len(questions), REQUESTS)):
        server.flush_cache()
        question = questions[number % len(questions)].text
        try:
            replies.append(reply(server.url, [("video", video), ("text", question)], ANSWER_TOKENS))
        except openai.BadRequestError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else error
            raise ValueError(f"the server refused the video: {said}") from error
    return replies


def time_to_first_token(replies: Sequence[Reply]) -> dict[str, float]:
    """Seconds: of the first request with this video, and the median of the later ones (vision embedding cached)."""
    seconds = [reply.first_token_s for reply in replies]
    return {"first": seconds[0], "repeat": statistics.median(seconds[1:])}


def compare(questions: Sequence[Question], replies: Mapping[str, Sequence[Reply]]) -> list[dict[str, Any]]:
    """For the report: each question, its truth, every server's answer, and whether it is right (None: not known)."""
    rows = []
    for number, question in enumerate(questions):
        answers = {name: given[number].text for name, given in replies.items()}
        right = {name: None if question.truth is None else text == question.truth for name, text in answers.items()}
        rows.append({"question": question.text, "truth": question.truth, "answers": answers, "right": right})
    return rows
