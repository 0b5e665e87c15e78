"""What a clip shows, as a few numbers, and its drawing on any device, all frames at once.

Shapes: F frames of a clip, B clips of one shape, M stamps, H and W pixels, S the side of a background.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.tiny_model import sprites

PHOTOGRAPH_FILE = Path(__file__).parents[2] / ".gpukit" / "photographs.npz"
PHOTOGRAPHS, TEXTURES, SIDE = 5, 27, 384
DIRECTIONS = 8
SPLITS = ("train", "test")
FRAMES_AT_ONCE = 512  # bounds the memory of a long video's coordinates


@dataclass
class Clip:
    """One video or image (F = 1) before it is drawn; `seconds` is the time from one pair of frames to the next."""

    frames: int
    height: int
    width: int
    seconds: float
    camera: npt.NDArray[np.float32]  # [F, 4]: background, centre x, centre y, width, in shares of its side
    stamps: list[tuple[int, ...]] = field(default_factory=list)  # frame, sprite, x, y, width, height, r, g, b

    @property
    def tokens(self) -> int:
        return math.ceil(self.frames / 2) * (self.height // 28) * (self.width // 28)

    @property
    def grid(self) -> tuple[int, int, int]:
        return math.ceil(self.frames / 2), self.height // 14, self.width // 14

    def pair(self, number: int) -> Clip:
        """One pair of frames, with what is stamped on it, as a clip of its own."""
        stamps = [(stamp[0] - 2 * number, *stamp[1:]) for stamp in self.stamps if stamp[0] // 2 == number]
        return Clip(2, self.height, self.width, self.seconds, self.camera[2 * number : 2 * number + 2], stamps)

    def stamp(self, pair: int, sprite: str, box: tuple[int, int, int, int], colour: str = "white") -> None:
        """Put a sprite into `box` (x, y, width, height) of both frames of a pair; later ones cover earlier ones."""
        for frame in range(2 * pair, min(2 * pair + 2, self.frames)):
            self.stamps.append((frame, sprites.NUMBER[sprite], *box, *sprites.COLOUR_VALUES[colour]))


def new_clip(frames: int, height: int, width: int, seconds: float, choice: random.Random, split: str) -> Clip:
    """A clip in slow motion over one to three backgrounds.

    The test split has pairs of background and direction of motion that training never sees.
    """
    camera = np.empty((frames, 4), np.float32)
    cuts = sorted({0, *(choice.randrange(frames) for _ in range(choice.randrange(3)))})
    for start, end in zip(cuts, [*cuts[1:], frames], strict=True):
        while True:
            background, direction = choice.randrange(PHOTOGRAPHS + TEXTURES), choice.randrange(DIRECTIONS)
            if held_out(background, direction) == (split == "test"):
                break
        view = choice.uniform(0.35, 0.6)
        way = choice.uniform(0.0, 0.5 - view * 0.75)
        angle = (direction + choice.random()) * 2 * math.pi / DIRECTIONS
        at = np.linspace(-1.0, 1.0, end - start) * way
        camera[start:end, 0] = background
        camera[start:end, 1] = 0.5 + at * math.cos(angle)
        camera[start:end, 2] = 0.5 + at * math.sin(angle)
        camera[start:end, 3] = view
    return Clip(frames, height, width, seconds, camera)


def held_out(background: int, direction: int) -> bool:
    """Whether a background moving in this direction belongs to the test split."""
    return (background * 3 + direction) % 4 == 0


def render(clips: Sequence[Clip], device: str, *, photographs: bool = True) -> torch.Tensor:
    """Draw clips of one shape, uint8 [B * F, 3, H, W].

    Args:
        photographs: False has textures stand in for the photographs, where scikit-image and PHOTOGRAPH_FILE are absent.
    """
    high, wide, frames = clips[0].height, clips[0].width, clips[0].frames
    assert all((clip.height, clip.width, clip.frames) == (high, wide, frames) for clip in clips)
    camera = torch.from_numpy(np.concatenate([clip.camera for clip in clips])).to(device, non_blocking=True)
    source = backgrounds(device, photographs)  # [1, 3, P * S, S]
    ys, xs = ((torch.arange(side, device=device) + 0.5 - side / 2) / max(high, wide) for side in (high, wide))
    out = torch.empty(len(camera), 3, high, wide, dtype=torch.uint8, device=device)
    many = PHOTOGRAPHS + TEXTURES
    for start in range(0, len(camera), FRAMES_AT_ONCE):
        part = camera[start : start + FRAMES_AT_ONCE]
        x = (part[:, 1:2] + part[:, 3:4] * xs) * 2 - 1  # [f, W]
        y = (part[:, :1] + part[:, 2:3] + part[:, 3:4] * ys) * (2 / many) - 1  # [f, H]
        where = torch.empty(len(part), high, wide, 2, device=device)
        where[..., 0], where[..., 1] = x[:, None, :], y[:, :, None]
        seen = torch.nn.functional.grid_sample(source, where.view(1, -1, wide, 2), align_corners=False)
        out[start : start + len(part)] = seen.view(3, len(part), high, wide).transpose(0, 1).round().to(torch.uint8)
    rows = [(clip * frames + stamp[0], *stamp[1:]) for clip, shown in enumerate(clips) for stamp in shown.stamps]
    if rows:
        _draw(out, np.asarray(rows, np.int64))
    return out


def _draw(out: torch.Tensor, rows: npt.NDArray[np.int64]) -> None:
    """Stamp `rows` [M, 9] onto `out` [F, 3, H, W], a frame's n-th stamp in the n-th round."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    first = np.searchsorted(rows[:, 0], rows[:, 0])
    layer = np.arange(len(rows)) - first
    device = str(out.device)
    atlas, palette = sprites.atlas(device), sprites.palette(device)
    ys = torch.arange(out.shape[2], device=device)
    xs = torch.arange(out.shape[3], device=device)
    for number in range(int(layer.max()) + 1):
        for part in np.array_split(chosen := rows[layer == number], math.ceil(len(chosen) / FRAMES_AT_ONCE)):
            frame, sprite, x, y, w, h, *rgb = torch.from_numpy(part.T.copy()).to(device)
            u = (xs - x[:, None]) * sprites.SIDE // w[:, None]  # [m, W]
            v = (ys - y[:, None]) * sprites.SIDE // h[:, None]  # [m, H]
            inside = ((u >= 0) & (u < sprites.SIDE))[:, None, :] & ((v >= 0) & (v < sprites.SIDE))[:, :, None]
            u, v = u.clamp(0, sprites.SIDE - 1), v.clamp(0, sprites.SIDE - 1)
            value = torch.where(inside, atlas[sprite[:, None, None], v[:, :, None], u[:, None, :]], 0)  # [m, H, W]
            own = torch.stack(rgb, 1).to(torch.uint8)[:, :, None, None]  # [m, 3, 1, 1]
            fixed = palette[value.long()].movedim(-1, 1)  # [m, 3, H, W]
            value = value[:, None]
            out[frame] = torch.where(value == 0, out[frame], torch.where(value == 1, own, fixed))


@lru_cache(maxsize=4)
def backgrounds(device: str, photographs: bool) -> torch.Tensor:
    """Photographs, then textures, one below the other: float [1, 3, P * S, S] of 0 to 255."""
    pictures = [*(_photographs() if photographs else [_texture(-1 - n) for n in range(PHOTOGRAPHS)])]
    pictures += [_texture(number) for number in range(TEXTURES)]
    return torch.from_numpy(np.concatenate(pictures)).permute(2, 0, 1)[None].to(device, torch.float32).contiguous()


def _texture(number: int) -> npt.NDArray[np.uint8]:
    """A gradient with waves of a few lengths, uint8 [S, S, 3]."""
    choice = np.random.default_rng(number + 1000)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    value = np.zeros((SIDE, SIDE, 3))
    for strength in (60, 40, 25, 15, *((20,) * (number % 4))):
        kx, ky = choice.normal(0, 60 / strength * 8, 2)
        value += strength * choice.uniform(-1, 1, 3) * np.sin(kx * x + ky * y + choice.uniform(0, 6.3))[..., None]
    value += choice.uniform(50, 200, 3) + choice.normal(0, 2 + number % 5 * 4, (SIDE, SIDE, 1))
    return value.clip(0, 255).astype(np.uint8)


def _photographs() -> list[Any]:
    if PHOTOGRAPH_FILE.is_file():
        with np.load(PHOTOGRAPH_FILE) as stored:
            return list(stored["photographs"])
    from PIL import Image

    from mm_sglang.demo.video import PHOTOGRAPHS as SOURCES
    from mm_sglang.demo.video import photograph

    return [np.asarray(Image.fromarray(photograph(source.file)).resize((SIDE, SIDE))) for source in SOURCES]


def pack_photographs() -> Path:
    """Write the photographs where a machine without scikit-image finds them (git ignores the folder)."""
    pictures = np.stack(_photographs())
    PHOTOGRAPH_FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(PHOTOGRAPH_FILE, photographs=pictures)
    return PHOTOGRAPH_FILE
