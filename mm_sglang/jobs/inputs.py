"""What a job asks, and under which key its answer is filed: the content of it all, not file names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Stamp = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Input:
    """One question about one video. `key` is of both and of everything else that an answer depends on."""

    key: str
    video: Path
    stamp: Stamp

    def changed(self) -> str | None:
        """Why this is no longer the video that `key` stands for; None if it is."""
        try:
            now = _stamp(self.video)
        except OSError:
            return f"{self.video}: the video vanished while the job ran"
        return None if now == self.stamp else f"{self.video}: the video changed while the job ran"


def read_inputs(videos: Iterable[Path], asked: Any) -> list[Input]:
    """Each different video once, in order. `asked` is JSON: question, schema, model and settings.

    Raises:
        ValueError: a video that cannot be read.
    """
    found: dict[str, Input] = {}
    for video in videos:
        try:
            stamp = _stamp(video)
            with video.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ValueError(f"video {video}: needs a file that can be read ({error.strerror})") from error
        text = json.dumps([content, asked], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        found.setdefault(key, Input(key=key, video=video.absolute(), stamp=stamp))
    return list(found.values())


def require_files(videos: Sequence[Path]) -> None:
    """ValueError if there are none, or one is missing: known in no time, before anything is started."""
    if not videos:
        raise ValueError("no videos: needs at least one file")
    for video in videos:
        if not video.is_file():
            raise ValueError(f"video {video}: needs a file")


def _stamp(video: Path) -> Stamp:
    status = video.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
