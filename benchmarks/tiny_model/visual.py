"""The tasks on one video: v_niah, tracking, order, counting, caption."""

from __future__ import annotations

import itertools
import random

from benchmarks.tiny_model.plans import EDGE_TOKENS, TURN_TOKENS, Plan, Request, needle, places, relative, video
from benchmarks.tiny_model.scenes import Clip
from benchmarks.tiny_model.words import COLOURS, CORNERS, GLYPHS, PLACES, SHAPES
from mm_sglang.demo.needles import question


def _open(request: Request, turns: int, least_pairs: int) -> tuple[Clip, random.Random, int]:
    """The video that fills what `turns` turns leave, the random source of its content, and its pairs of frames."""
    choice, shape = request.content(), request.shape()
    clip = video(request, request.tokens - EDGE_TOKENS - turns * TURN_TOKENS, shape, choice, least_pairs)
    return clip, choice, clip.frames // 2


def v_niah(request: Request) -> Plan:
    turns = request.turns_within(len(COLOURS))
    clip, choice, pairs = _open(request, turns, 12)
    many = min(max(turns, choice.randint(3, 6)), pairs)
    marks = list(
        zip(
            places(many, pairs, choice, request.depth),
            choice.sample(COLOURS, many),
            choice.choices(GLYPHS, k=many),
            strict=True,
        )
    )
    for pair, colour, glyph in marks:
        needle(clip, pair, colour, glyph, choice)
    asked = [(question(colour), glyph) for _, colour, glyph in marks[:turns]]
    return Plan("v_niah", [("video", clip)], asked, relative(marks[0][0], clip))


def order(request: Request) -> Plan:
    turns = request.turns_within(24)
    clip, choice, pairs = _open(request, turns, 12)
    many = min(max(2, choice.randint(3, 7) if turns > 1 else 4), pairs)
    marks = list(zip(places(many, pairs, choice, request.depth), choice.sample(COLOURS, many), strict=True))
    for pair, colour in marks:
        needle(clip, pair, colour, choice.choice(GLYPHS), choice)
    couples = list(itertools.combinations(marks, 2))
    rest = couples[1:]
    choice.shuffle(rest)
    asked = []
    for one, two in [couples[0], *rest][:turns]:  # the first couple holds the frame at the asked depth
        a, b = choice.sample((one, two), 2)
        asked.append((f"Which frame came first, the {a[1]} one or the {b[1]} one?", min(a, b)[1]))
    return Plan("order", [("video", clip)], asked, relative(marks[0][0], clip))


def tracking(request: Request) -> Plan:
    """Balls, one after another, each resting at its last place for at least half of its time."""
    turns = request.turns_within(len(COLOURS))
    clip, choice, pairs = _open(request, turns, 16)
    many = max(1, min(max(turns, 3), pairs // 5))
    slot = pairs // many  # each ball has a stretch of its own
    stretches = choice.sample(range(many), many)
    if request.depth is not None:
        at = min(int(request.depth * many), many - 1)
        stretches.sort(key=lambda stretch: stretch != at)
    asked, depth = [], 0.0
    for number, (stretch, colour) in enumerate(zip(stretches, choice.sample(COLOURS, many), strict=True)):
        length = choice.randint(min(4, slot), min(12, slot))
        start = stretch * slot + choice.randint(0, slot - length)
        if number == 0 and request.depth is not None:
            start = min(
                max(round(request.depth * (pairs - 1)) - length + 1, stretch * slot), (stretch + 1) * slot - length
            )
        cells = [choice.randrange(9) for _ in range(2)]
        for step in range(length):
            gone = min(1.0, step / max(length // 2, 1))
            _ball(clip, start + step, colour, cells, gone, choice)
        if number == 0:
            depth = relative(start + length - 1, clip)
        asked.append((f"Where was the {colour} ball last?", PLACES[cells[1]]))
    return Plan("tracking", [("video", clip)], asked[:turns], depth)


def _ball(clip: Clip, pair: int, colour: str, cells: list[int], gone: float, choice: random.Random) -> None:
    """A ball on its way between the middles of two of nine cells, in a board whose sides have colours of their own."""
    clip.stamp(pair, "board", (0, 0, clip.width, clip.height))
    margin = 1 / 12
    size = round(min(clip.width, clip.height) * (1 - 2 * margin) / 3 * 0.9)
    box = []
    for side, axis in ((clip.width, [cell % 3 for cell in cells]), (clip.height, [cell // 3 for cell in cells])):
        at = axis[0] + (axis[1] - axis[0]) * gone + choice.uniform(-0.1, 0.1)
        middle = side * (margin + (1 - 2 * margin) * (at + 0.5) / 3)
        box.append(min(max(round(middle - size / 2), 0), side - size))
    clip.stamp(pair, "ball", (box[0], box[1], size, size), colour)


def counting(request: Request) -> Plan:
    turns = request.turns_within(len(SHAPES))
    clip, choice, pairs = _open(request, turns, 24)
    shapes = ["star", *choice.sample(SHAPES[1:], min(max(turns - 1, 1), pairs - 1))]
    if turns > 1:
        choice.shuffle(shapes)
    counts = [choice.randint(1, max(1, min(6, pairs // len(shapes)))) for _ in shapes]
    shown = [shape for shape, count in zip(shapes, counts, strict=True) for _ in range(count)]
    where = places(len(shown), pairs, choice, request.depth)
    for pair, shape in zip(where, shown, strict=True):
        size = max(44, min(110, round(choice.uniform(0.35, 0.55) * min(clip.height, clip.width))))
        x, y = choice.randint(0, clip.width - size), choice.randint(0, clip.height - size)
        clip.stamp(pair, shape, (x, y, size, size))
    asked = [(f"How many frames show a {shape}?", str(count)) for shape, count in zip(shapes, counts, strict=True)]
    return Plan("counting", [("video", clip)], asked[:turns], relative(where[0], clip))


def caption(request: Request) -> Plan:
    turns = request.turns_within(24)
    clip, choice, pairs = _open(request, turns, 12)
    many = min(max(3, turns // 4), len(COLOURS), pairs)
    colours = choice.sample(COLOURS, many)
    where = places(many, pairs, choice, request.depth)
    asked = []
    for pair, colour in zip(where, colours, strict=True):
        clip.stamp(pair, "border", (0, 0, clip.width, clip.height), colour)
        wide = max(18, min(40, round(choice.uniform(0.15, 0.18) * min(clip.width, clip.height))))
        for corner in CORNERS:
            number = choice.randint(10, 99)
            vertical, side = corner.split()
            x = clip.width // 8 + 1 if side == "left" else clip.width * 7 // 8 - 1 - 2 * wide
            y = clip.height // 8 + 1 if vertical == "top" else clip.height * 7 // 8 - 1 - wide
            for place, digit in enumerate(str(number)):
                clip.stamp(pair, digit, (x + place * wide, y, wide, wide))
            asked.append((f"Which number stands at the {corner} of the {colour} frame?", str(number)))
    first = asked.pop(choice.randrange(len(CORNERS)))
    choice.shuffle(asked)
    return Plan("caption", [("video", clip)], [first, *asked][:turns], relative(where[0], clip))
