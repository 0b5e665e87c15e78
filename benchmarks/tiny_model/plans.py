"""One sample before anything is drawn: text, clips and turns. Planning needs no torch and no tokenizer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.tiny_model.scenes import SPLITS, Clip, new_clip
from mm_sglang.demo.needles import glyph_box

FRAME_SIDES = (112, 140, 168, 196, 224, 252, 280, 308, 336)  # SGLang enlarges frames of fewer than 128 tokens
# From one pair of frames to the next. 2/24 is what SGLang 0.5.23 takes for every video, as its processor gets no frame
# rate; long waits in training give short contexts the positions of long ones: a text of 33K tokens, a quarter of a
# mixed context of 128K, is further from the question than short contexts reach otherwise.
SGLANG_SECONDS = 2 / 24
TOKENS_PER_SECOND = 2  # rotary positions, in the model's config
SECONDS = {
    "train": (SGLANG_SECONDS, SGLANG_SECONDS, 0.5, 1.0, 2.0, 5.0, 15.0, 40.0, 120.0, 400.0),
    "test": (SGLANG_SECONDS, SGLANG_SECONDS, 1.0, 2.0),
}
EXTENT = 1 << 17  # rotary positions of a video at most, where a shorter wait allows it
TURN_TOKENS = 28  # at most, a question and its answer with the chat template's marks around them
EDGE_TOKENS = 16  # the first user's mark and what encloses a video or an image


def least_tokens(task: str) -> int:
    """Of a context: one pair of frames, two of them, some sentences, or text, an image and a video."""
    return {"order": 80, "codes": 128, "mm_niah": 384}.get(task, 64)


@dataclass
class Plan:
    """As tasks.Sample, with clips in place of pixels."""

    task: str
    parts: list[tuple[str, str | Clip]]
    turns: list[tuple[str, str]]
    depth: float

    @property
    def clips(self) -> list[Clip]:
        return [part for _, part in self.parts if isinstance(part, Clip)]


@dataclass(frozen=True)
class Request:
    """What is wanted of a plan; `shape_seed` decides sizes and lengths of clips, so that plans can share them."""

    task: str
    tokens: int
    seed: int
    split: str
    depth: float | None
    turns: int
    shape_seed: int

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r}: needs one of {SPLITS}")
        least = least_tokens(self.task)
        if self.tokens < least or self.turns < 1:
            raise ValueError(f"tokens={self.tokens}, turns={self.turns}: needs at least {least} tokens and 1 turn")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth={self.depth}: needs 0 to 1")

    def content(self) -> random.Random:
        return random.Random(f"{self.split}/{self.task}/{self.tokens}/{self.seed}")

    def shape(self) -> random.Random:
        return random.Random(f"{self.split}/{self.task}/{self.tokens}/shape/{self.shape_seed}")

    def turns_within(self, limit: int) -> int:
        """Turns that leave at least half of the tokens to the context."""
        return max(1, min(self.turns, limit, (self.tokens // 2 - EDGE_TOKENS) // TURN_TOKENS))


def video(request: Request, tokens: int, shape: random.Random, choice: random.Random, least_pairs: int) -> Clip:
    """A clip of at most `tokens`, with at least `least_pairs` pairs of frames where 112 x 112 allows it."""
    fitting = [(h, w) for h in FRAME_SIDES for w in FRAME_SIDES if h * w // 784 * least_pairs <= tokens]
    high, wide = shape.choice(fitting or [(112, 112)])
    pairs = tokens // (high * wide // 784)
    if pairs < 1:
        raise ValueError(f"tokens={request.tokens}: leaves {tokens} tokens for a video, which needs at least 16")
    waits = SECONDS[request.split]
    waits = tuple(wait for wait in waits if pairs * wait * TOKENS_PER_SECOND <= EXTENT) or waits[:1]
    return new_clip(2 * pairs, high, wide, shape.choice(waits), choice, request.split)


def places(count: int, pairs: int, choice: random.Random, depth: float | None) -> list[int]:
    """`count` different pairs of frames in random order; with `depth` the first one lies there."""
    chosen = choice.sample(range(pairs), count)
    if depth is not None:
        first = round(depth * (pairs - 1))
        chosen = [first, *[at for at in chosen if at != first][: count - 1]]
    return chosen


def relative(pair: int, clip: Clip) -> float:
    return pair / max(clip.frames // 2 - 1, 1)


def needle(clip: Clip, pair: int, colour: str, glyph: str, choice: random.Random) -> None:
    """A thick border of one colour around a big glyph near the middle."""
    share, across, down = choice.uniform(0.42, 0.62), choice.uniform(0.25, 0.75), choice.uniform(0.25, 0.75)
    clip.stamp(pair, "border", (0, 0, clip.width, clip.height), colour)
    clip.stamp(pair, glyph, glyph_box(clip.width, clip.height, share, across, down))
