"""The demo's video: photographs in slow motion, cross-faded, needles among them, as H.264 in an mp4; all made here."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mm_sglang.demo.needles import NEEDLE_S, Needle, drawn

Frame = npt.NDArray[np.uint8]  # [height, width, 3]


@dataclass(frozen=True)
class Photograph:
    file: str
    name: str
    credit: str
    licence: str


# All ship inside scikit-image's wheel (skimage/data); what is said of them is from skimage/data/_fetchers.py.
PHOTOGRAPHS = (
    Photograph("astronaut.png", "Eileen Collins", "NASA Great Images", "public domain"),
    Photograph("coffee.png", "cup of coffee", "Rachel Michetti, Pikolo Espresso Bar", "CC0"),
    Photograph("rocket.jpg", "rocket at launch", "SpaceX", "public domain"),
    Photograph("chelsea.png", "Chelsea the cat", "Stefan van der Walt", "CC0"),
    Photograph("hubble_deep_field.jpg", "Hubble eXtreme Deep Field", "NASA", "public domain"),
)
# Without mbtree=0 x264's output depends on what malloc's memory held before: files of the same frames differ.
X264 = {"crf": "23", "preset": "veryfast", "x264-params": "mbtree=0"}
SCENE_S = 8.0  # a photograph is shown this long
FADE_S = 1.0  # and fades into the next one this long


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    path: Path
    seconds: float
    frames: int
    fps: int
    width: int
    height: int
    bytes: int


def render_video(
    path: Path,
    *,
    seconds: float = 64.0,
    fps: int = 8,
    width: int = 448,
    height: int = 336,
    seed: int = 0,
    needles: Sequence[Needle] = (),
) -> VideoFacts:
    """Write the mp4; a finished file only ever stands under `path`.

    The same arguments give the same bytes on one machine. On another one x264 may choose other SIMD code, which rounds
    otherwise, so only the frames given to it are the same there.

    Args:
        seconds: length, at least one frame.
        fps: frames a second.
        width, height: in pixels, even (H.264's chroma), at least 16.
        seed: of the order of photographs and their motion.
        needles: each stands over the photographs for NEEDLE_S, wholly within the video and no two at once.

    Raises:
        ValueError: an argument out of those ranges.
    """
    if fps < 1 or not 1 <= seconds * fps < math.inf:  # NaN too
        raise ValueError(f"seconds={seconds}, fps={fps}: needs a finite length of at least one frame")
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 2:
            raise ValueError(f"{name}={value}: needs an even number of pixels from 16")
    begins = sorted(needle.second for needle in needles)
    if any(not 0 <= begin <= end - NEEDLE_S for begin, end in zip(begins, [*begins[1:], seconds], strict=False)):
        raise ValueError(f"needles at {begins} s: needs {NEEDLE_S} s for each within {seconds} s, no two at once")
    import av

    frames = round(seconds * fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    try:
        with av.open(str(unfinished), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", rate=fps, options=X264)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.thread_count = 1  # slices, and so the bytes, do not depend on the number of cores
            for number, image in enumerate(scene_frames(frames, fps, width, height, seed)):
                for needle in needles:
                    if needle.shown(number / fps):
                        image = drawn(image, needle)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    size = path.stat().st_size
    return VideoFacts(path=path, seconds=frames / fps, frames=frames, fps=fps, width=width, height=height, bytes=size)


def scene_frames(frames: int, fps: int, width: int, height: int, seed: int) -> Iterator[Frame]:
    """The frames one by one: each photograph under a slowly moving, slowly zooming window."""
    choice = random.Random(seed)
    order = list(PHOTOGRAPHS)
    choice.shuffle(order)
    scenes = math.ceil(frames / fps / SCENE_S) + 1
    moves = [(choice.uniform(0, 2 * math.pi), choice.choice((-1, 1))) for _ in range(scenes)]
    photographs = [photograph(entry.file) for entry in order]

    def shot(scene: int, at: float) -> Frame:
        return _window(photographs[scene % len(photographs)], at, *moves[scene], width, height)

    for number in range(frames):
        scene, second = divmod(number / fps, SCENE_S)
        image = shot(int(scene), second / SCENE_S)
        fade = (second - (SCENE_S - FADE_S)) / FADE_S
        if fade > 0:
            following = shot(int(scene) + 1, 0.0)
            image = (image * (1 - fade) + following * fade).round().astype(np.uint8)
        yield image


def photograph(file: str) -> Frame:
    """uint8 RGB [height, width, 3] of one of PHOTOGRAPHS. ValueError if scikit-image, which holds them, is missing."""
    from PIL import Image

    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("the demo's photographs ship inside scikit-image: needs `pip install scikit-image`")
    with Image.open(Path(spec.origin).parent / "data" / file) as image:
        return np.asarray(image.convert("RGB"))


def _window(photograph: Frame, at: float, angle: float, direction: int, width: int, height: int) -> Frame:
    """The photograph seen through a window of the video's aspect at time `at` (0 to 1) of its scene."""
    from PIL import Image

    high, wide = photograph.shape[:2]
    largest = min(wide, high * width / height)
    zoom = 0.80 - 0.18 * (at if direction > 0 else 1 - at)
    w = largest * zoom
    h = w * height / width
    drift = 0.5 + 0.42 * (at - 0.5) * np.array([math.cos(angle), math.sin(angle)])
    x, y = (wide - w) * drift[0], (high - h) * drift[1]
    seen = Image.fromarray(photograph).resize((width, height), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return np.asarray(seen)
