"""Bitmaps that are stamped onto frames: glyphs on a dark plate, shapes, a ball, borders.

A sprite's pixel is 0 (see-through), 1 (the stamp's own colour) or the index of a fixed colour in PALETTE.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from benchmarks.tiny_model.words import GLYPHS, SHAPES

SIDE = 64  # pixels of a sprite's side before it is stretched to its stamp's size
PALETTE = (
    (0, 0, 0), (0, 0, 0), (12, 12, 12), (255, 255, 255), (255, 220, 0), (0, 90, 255), (0, 200, 60), (230, 20, 160),
)  # fmt: skip
COLOUR_VALUES = {
    "red": (235, 20, 20), "green": (20, 190, 40), "blue": (30, 50, 235), "yellow": (250, 230, 20),
    "cyan": (20, 220, 235), "purple": (140, 30, 190), "orange": (250, 130, 10), "white": (255, 255, 255),
}  # fmt: skip
BLACK, WHITE, TOP, BOTTOM, LEFT, RIGHT = 2, 3, 4, 5, 6, 7

# Rows of five dots, top first, one hexadecimal byte each.
FONT = {
    "0": "0E11131519110E", "1": "040C040404040E", "2": "0E11010204081F", "3": "1F02040201110E",
    "4": "02060A121F0202", "5": "1F101E0101110E", "6": "0608101E11110E", "7": "1F010204080808",
    "8": "0E11110E11110E", "9": "0E11110F01020C", "A": "0E11111F111111", "C": "0E11101010110E",
    "F": "1F10101E101010", "H": "1111111F111111", "K": "11121418141211", "T": "1F040404040404",
}  # fmt: skip
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
    if name in FONT:
        rows = bytes.fromhex(FONT[name])
        dots = torch.tensor([[row >> (4 - column) & 1 for column in range(5)] for row in rows], dtype=torch.bool)
        return _on_plate(dots, (9, 7))
    if name in DRAWN:
        dots = torch.tensor([[mark == "#" for mark in row] for row in DRAWN[name].split()])
        return _on_plate(dots, (11, 11))
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    out = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
    if name == "border":
        out[_edge(x, y) < SIDE // 8] = 1
    elif name == "board":  # four sides in four colours: only they tell a model without absolute positions where it is
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


def _on_plate(dots: torch.Tensor, cells: tuple[int, int]) -> torch.Tensor:
    """White dots in the middle of a dark plate of `cells` (rows, columns), stretched to a sprite."""
    plate = torch.full(cells, BLACK, dtype=torch.uint8)
    high, wide = dots.shape
    top, left = (cells[0] - high) // 2, (cells[1] - wide) // 2
    plate[top : top + high, left : left + wide][dots] = WHITE
    rows, columns = (torch.arange(SIDE) * n // SIDE for n in cells)
    return plate[rows][:, columns]
