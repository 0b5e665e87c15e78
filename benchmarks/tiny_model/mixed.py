"""mm_niah: needles in text, in videos and in images that stand between one another; codes: in text alone."""

from __future__ import annotations

import random

from benchmarks.tiny_model.plans import EDGE_TOKENS, FRAME_SIDES, TURN_TOKENS, Plan, Request, needle, video
from benchmarks.tiny_model.scenes import Clip, new_clip
from benchmarks.tiny_model.words import CODES, COLOURS, GLYPHS, NAMES, count, filler

TEXT_SHARE = 0.25
SENTENCE_TOKENS = 12  # at most
NEAR = 0.08  # of the context: how far from the asked depth a needle may lie if one of the other kind is nearer


def mm_niah(request: Request) -> Plan:
    turns = request.turns_within(24)
    choice, shape = request.content(), request.shape()
    tokens = request.tokens - turns * TURN_TOKENS
    clips, texts = _parts(request, tokens, choice, shape)
    return _plan(request, turns, clips, texts, choice)


def codes(request: Request) -> Plan:
    """The text's needles alone: a lesson for training, no part of the benchmark."""
    turns = request.turns_within(24)
    text = request.tokens - turns * TURN_TOKENS - EDGE_TOKENS
    return _plan(request, turns, [], [text], request.content())


def _plan(request: Request, turns: int, clips: list[Clip], texts: list[int], choice: random.Random) -> Plan:
    """Texts of that many tokens at most, with the clips between them and needles in both."""
    parts: list[tuple[str, str | Clip]] = []
    offsets, at = [], 0  # of the clips, in tokens
    sentences: list[tuple[int, int, str]] = []  # offset, number of the text, the sentence
    for number, goal in enumerate(texts):
        used = 0
        while used + SENTENCE_TOKENS <= goal:
            sentence = filler(choice)
            sentences.append((at + used, number, sentence))
            used += count(sentence)
        at += used
        if number < len(clips):
            offsets.append(at)
            at += clips[number].tokens + 2
    asked = _hide(request, turns, clips, offsets, sentences, at, choice)
    for number in range(len(texts)):
        words = " ".join(sentence for _, text, sentence in sentences if text == number)
        if words:
            parts.append(("text", words))
        if number < len(clips):
            parts.append(("video" if clips[number].frames > 1 else "image", clips[number]))
    return Plan(request.task, parts, [turn for _, turn in asked][:turns], asked[0][0])


def _parts(request: Request, tokens: int, choice: random.Random, shape: random.Random) -> tuple[list[Clip], list[int]]:
    """Clips in order, and the tokens of the text before each and after the last."""
    images = shape.randint(1, min(6, max(1, tokens // 512)))
    videos = shape.randint(1, min(4, max(1, tokens // 1024)))
    kinds = ["video"] * videos + ["image"] * images
    shape.shuffle(kinds)
    text = int(tokens * TEXT_SHARE)
    sides = [side for side in FRAME_SIDES if (side // 28) ** 2 * images * 4 <= tokens] or [112]
    sizes = [(shape.choice(sides), shape.choice(sides)) for kind in kinds if kind == "image"]
    room = tokens - text - sum(h * w // 784 for h, w in sizes) - EDGE_TOKENS * len(kinds)
    clips = []
    for kind in kinds:
        if kind == "image":
            clips.append(new_clip(1, *sizes.pop(), 1.0, choice, request.split))
        else:
            clips.append(video(request, room // videos, shape, choice, 6))
    cuts = sorted(shape.randint(0, text) for _ in kinds)
    return clips, [end - start for start, end in zip([0, *cuts], [*cuts, text], strict=True)]


def _hide(
    request: Request,
    turns: int,
    clips: list[Clip],
    offsets: list[int],
    sentences: list[tuple[int, int, str]],
    length: int,
    choice: random.Random,
) -> list[tuple[float, tuple[str, str]]]:
    """Put the needles in; (depth, turn) of all of them, the one at the asked depth first, the others shuffled."""
    frames = [
        (offset + pair * (clip.height // 28) * (clip.width // 28), number, pair)
        for number, (clip, offset) in enumerate(zip(clips, offsets, strict=True))
        for pair in range((clip.frames + 1) // 2)
    ]
    in_frames = min(max(3, turns // 3), len(COLOURS), len(frames))
    in_text = min(max(3, turns - in_frames), len(CODES), len(sentences) // 2)
    pictures, lines = choice.sample(frames, in_frames), choice.sample(range(len(sentences)), in_text)
    text_first = not frames or (in_text > 0 and choice.random() < 0.5)
    if request.depth is not None:
        wanted = request.depth * length
        nearest = min(range(len(sentences)), key=lambda at: abs(sentences[at][0] - wanted))
        best = min(frames, key=lambda slot: abs(slot[0] - wanted), default=(1 << 40, 0, 0))
        apart = abs(sentences[nearest][0] - wanted), abs(best[0] - wanted)
        if max(apart) > NEAR * length:  # the text, or the frames, may all lie elsewhere
            text_first = apart[0] <= apart[1]
        if text_first:
            lines = [nearest, *[at for at in lines if at != nearest][: in_text - 1]]
        else:
            pictures = [best, *[slot for slot in pictures if slot != best][: in_frames - 1]]
    seen, told = [], []
    for (offset, number, pair), colour in zip(pictures, choice.sample(COLOURS, in_frames), strict=True):
        glyph = choice.choice(GLYPHS)
        needle(clips[number], pair, colour, glyph, choice)
        seen.append((offset / length, (f"What does the frame with the {colour} border show?", glyph)))
    for at, code in zip(lines, choice.sample(CODES, in_text), strict=True):
        name = choice.choice(NAMES)
        offset, number, _ = sentences[at]
        sentences[at] = (offset, number, f"The code of {name} is {code}.")
        told.append((offset / length, (f"Whose code is {code}?", name)))
    first = told.pop(0) if text_first else seen.pop(0)
    rest = [*seen, *told]
    choice.shuffle(rest)
    return [first, *rest]
