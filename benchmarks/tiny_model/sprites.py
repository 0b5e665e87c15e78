"""Bitmaps that are stamped onto frames: glyphs on a dark plate, shapes, a ball, borders.

A sprite's pixel is 0 (see-through), 1 (the stamp's own colour) or the index of a fixed colour in PALETTE. Glyphs and
the border are the product's (mm_sglang/demo/needles.py), whose demo asks about them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from benchmarks.tiny_model.words import GLYPHS, SHAPES
from mm_sglang.demo import needles

SIDE, COLOUR_VALUES = needles.SIDE, needles.COLOUR_VALUES
BLACK, WHITE, TOP, BOTTOM, LEFT, RIGHT = needles.BLACK, needles.WHITE, 4, 5, 6, 7
PALETTE = (
    (0, 0, 0), (0, 0, 0), needles.BLACK_VALUE, needles.WHITE_VALUE,
    (255, 220, 0), (0, 90, 255), (0, 200, 60), (230, 20, 160),
)  # fmt: skip

DRAWN = {
    "star": "....#.... ....#.... ...###... ######### .#######. ..#####.. ..#####.. .##...##. #.......#",
    "heart": ".##...##. ####.#### ######### ######### ######### .#######. ..#####.. ...###... ....#....",
    "moon": "...####.. .####.... .###..... ###...... ###...... ###...... .###..... .####.... ...####..",
    "cross": "...###... ...###... ...###... ######### ######### ######### ...###... ...###... ...###...",
}

NUMBER = {name: at for at, name in enumerate((*GLYPHS, *SHAPES, "border", "board", "ball"))}


@lru_cache(maxsize=4)
def atlas(device: str) -> torch.Tensor:
    """All sprites in the order of NUMBER, uint8 [K, SIDE, SIDE]."""
    return torch.stack([_sprite(name) for name in NUMBER]).to(device)


@lru_cache(maxsize=4)
def palette(device: str) -> torch.Tensor:
    """Fixed colours, uint8 [8, 3]; entry 1 is a place holder for the stamp's own colour."""
    return torch.tensor(PALETTE, dtype=torch.uint8, device=device)


def _sprite(name: str) -> torch.Tensor:
    if name in needles.FONT:
        return torch.from_numpy(needles.glyph(name))
    if name in DRAWN:
        dots = np.array([[mark == "#" for mark in row] for row in DRAWN[name].split()])
        return torch.from_numpy(needles.on_plate(dots, (11, 11)))
    if name == "border":
        return torch.from_numpy(needles.border())
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    out = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    if name == "board":  # four sides in four colours: only they tell a model without absolute positions where it is
        for side, distance in ((TOP, y), (BOTTOM, SIDE - 1 - y), (LEFT, x), (RIGHT, SIDE - 1 - x)):
            out[(distance == _edge(x, y)) & (distance < SIDE // 12)] = side
    else:
        radius = ((x - (SIDE - 1) / 2) ** 2 + (y - (SIDE - 1) / 2) ** 2).sqrt()
        out[radius < SIDE / 2] = BLACK
        out[radius < SIDE * 0.42] = 1
    return out


def _edge(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the nearest side."""
    return torch.minimum(torch.minimum(x, SIDE - 1 - x), torch.minimum(y, SIDE - 1 - y))
