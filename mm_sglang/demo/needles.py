"""Needles: frames with a thick coloured border and a white glyph on a dark plate, and the question for each of them.

benchmarks/tiny_model draws its training videos with what is here, so the demo shows what the model learned to read.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

COLOUR_VALUES = {
    "red": (235, 20, 20), "green": (20, 190, 40), "blue": (30, 50, 235), "yellow": (250, 230, 20),
    "cyan": (20, 220, 235), "purple": (140, 30, 190), "orange": (250, 130, 10), "white": (255, 255, 255),
}  # fmt: skip
# Rows of five dots, top first, one hexadecimal byte each.
FONT = {
    "0": "0E11131519110E", "1": "040C040404040E", "2": "0E11010204081F", "3": "1F02040201110E",
    "4": "02060A121F0202", "5": "1F101E0101110E", "6": "0608101E11110E", "7": "1F010204080808",
    "8": "0E11110E11110E", "9": "0E11110F01020C", "A": "0E11111F111111", "C": "0E11101010110E",
    "F": "1F10101E101010", "H": "1111111F111111", "K": "11121418141211", "T": "1F040404040404",
}  # fmt: skip

SIDE = 64  # pixels of a bitmap's side before it is stretched to its place
CLEAR, OWN, BLACK, WHITE = range(4)  # a bitmap's pixel: see-through, its stamp's colour, or one of these
BLACK_VALUE, WHITE_VALUE = (12, 12, 12), (255, 255, 255)

NEEDLE_S = 2.0  # SGLang takes two frames a second and joins them in pairs: some pair lies wholly within this


@dataclass(frozen=True, kw_only=True)
class Needle:
    """From `second` on, for NEEDLE_S, the video's frames have a border of `colour` around `glyph`.

    Raises:
        ValueError: a colour that is not in COLOUR_VALUES, or a glyph that is not in FONT.
    """

    second: float
    colour: str
    glyph: str

    def __post_init__(self) -> None:
        for name, value, known in (("colour", self.colour, COLOUR_VALUES), ("glyph", self.glyph, FONT)):
            if value not in known:
                raise ValueError(f"{name}={value!r}: needs one of {', '.join(known)}")

    @property
    def question(self) -> str:
        return question(self.colour)

    def shown(self, second: float) -> bool:
        return self.second <= second < self.second + NEEDLE_S


def question(colour: str) -> str:
    """What the model was trained to answer with one glyph."""
    return f"What does the frame with the {colour} border show?"


def hide(count: int, *, seconds: float, seed: int) -> tuple[Needle, ...]:
    """`count` needles of different colours and glyphs, one anywhere in each of `count` equal stretches of a video.

    Raises:
        ValueError: fewer than 1, more than there are colours, or stretches shorter than a needle is shown.
    """
    if not 1 <= count <= len(COLOUR_VALUES):
        raise ValueError(f"count={count}: needs 1 to {len(COLOUR_VALUES)}, the number of colours")
    stretch = seconds / count
    if stretch < NEEDLE_S:
        raise ValueError(f"count={count}, seconds={seconds}: needs {NEEDLE_S} s for each needle")
    choice = random.Random(seed)
    colours, glyphs = choice.sample(list(COLOUR_VALUES), count), choice.sample(list(FONT), count)
    return tuple(
        Needle(second=at * stretch + choice.uniform(0, stretch - NEEDLE_S), colour=colour, glyph=glyph)
        for at, (colour, glyph) in enumerate(zip(colours, glyphs, strict=True))
    )


def drawn(frame: Pixels, needle: Needle) -> Pixels:
    """The frame, uint8 [height, width, 3], with the needle's border and glyph over it."""
    high, wide = frame.shape[:2]
    out = frame.copy()
    _stamp(out, border(), (0, 0, wide, high), COLOUR_VALUES[needle.colour])
    _stamp(out, glyph(needle.glyph), glyph_box(wide, high), WHITE_VALUE)
    return out


def glyph_box(
    width: int, height: int, share: float = 0.52, across: float = 0.5, down: float = 0.5
) -> tuple[int, int, int, int]:
    """x, y, width and height in pixels of a needle's glyph in a frame.

    Args:
        share: its side over the frame's shorter one; the side is 48 to 120 pixels.
        across, down: 0 to 1, where it lies in what the border leaves free.
    """
    size = max(48, min(round(share * min(height, width)), 120))
    x = width // 8 + round(across * max(width * 3 // 4 - size, 0))
    y = height // 8 + round(down * max(height * 3 // 4 - size, 0))
    return x, y, size, size


@lru_cache(maxsize=1)
def border() -> Pixels:
    """Bitmap [SIDE, SIDE]: OWN along all four sides."""
    at = np.arange(SIDE)
    edge = np.minimum(at, SIDE - 1 - at)
    return np.where(np.minimum(edge[:, None], edge) < SIDE // 8, OWN, CLEAR).astype(np.uint8)


@lru_cache(maxsize=len(FONT))
def glyph(name: str) -> Pixels:
    """Bitmap [SIDE, SIDE]: WHITE dots on a BLACK plate."""
    rows = bytes.fromhex(FONT[name])
    return on_plate(np.array([[row >> (4 - column) & 1 for column in range(5)] for row in rows], bool), (9, 7))


def on_plate(dots: npt.NDArray[np.bool_], cells: tuple[int, int]) -> Pixels:
    """WHITE dots in the middle of a BLACK plate of `cells` (rows, columns), stretched to a bitmap [SIDE, SIDE]."""
    plate = np.full(cells, BLACK, np.uint8)
    high, wide = dots.shape
    top, left = (cells[0] - high) // 2, (cells[1] - wide) // 2
    plate[top : top + high, left : left + wide][dots] = WHITE
    rows, columns = (np.arange(SIDE) * n // SIDE for n in cells)
    return plate[rows][:, columns]


def _stamp(out: Pixels, bitmap: Pixels, box: tuple[int, int, int, int], own: tuple[int, int, int]) -> None:
    """Put the bitmap, stretched to `box` (x, y, width, height, inside the frame), onto `out`."""
    x, y, wide, high = box
    value = bitmap[np.arange(high) * SIDE // high][:, np.arange(wide) * SIDE // wide]
    part = out[y : y + high, x : x + wide]
    for kind, colour in ((OWN, own), (BLACK, BLACK_VALUE), (WHITE, WHITE_VALUE)):
        part[value == kind] = colour
