"""Real models and media for the servers of tests/e2e."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_sglang.demo.client import Part
from mm_sglang.demo.tiny_model import ARCHITECTURES, make_tiny_model
from mm_sglang.demo.video import render_video, scene_frames


@dataclass(frozen=True, kw_only=True)
class Assets:
    models: dict[str, Path]  # by architecture
    prompts: dict[str, list[Part]]
    folder: Path


def _video(path: Path, **shape: Any) -> Path:
    elsewhere = os.environ.get("MM_SGLANG_VIDEOS")
    return render_video(path, **shape).path if elsewhere is None else Path(elsewhere) / path.name


def make_assets(folder: Path, *, head_dim: int = 32) -> Assets:
    """Models, two images and two videos; videos made elsewhere are taken from the folder MM_SGLANG_VIDEOS, if set."""
    from PIL import Image

    models = {name: make_tiny_model(folder / name, architecture=name, head_dim=head_dim) for name in ARCHITECTURES}
    wide = _video(folder / "wide.mp4", seconds=4.0, width=224, height=168, seed=1)
    tall = _video(folder / "tall.mp4", seconds=3.0, width=168, height=224, seed=2)
    image = folder / "image.png"
    Image.fromarray(next(scene_frames(1, 1, 224, 168, seed=3))).save(image)
    other = folder / "other.png"
    Image.fromarray(next(scene_frames(1, 1, 140, 252, seed=4))).save(other)
    question: Part = ("text", "what is in the video?")
    prompts: dict[str, list[Part]] = {
        "text": [("text", "the quick brown fox jumps over the lazy dog. " * 8)],
        "image": [("image", image), ("text", "what is it")],
        "images": [
            ("text", "compare "), ("image", image), ("text", " with "), ("image", other), ("text", " by size"),
        ],
        "video": [("video", tall), question],  # differs at the second token where frames attend to each other
        "mixed": [
            ("text", "first "), ("video", wide), ("text", " then "), ("image", image),
            ("text", " and last "), ("video", tall), question,
        ],
    }  # fmt: skip
    return Assets(models=models, prompts=prompts, folder=folder)
