"""A damaged video is the client's mistake: HTTP 400 with one clear line, not 500 with a decoder's C++ trace.

Why: a file cut off behind its index (faststart mp4) opens, then fails while frames are read; decord raises its own
    error class there and the server answers 500. An empty file is reported as "Error reading /tmp/…mp4".
How: AROUND `VideoDecoderWrapper.__init__` and `.get_frames_as_tensor`: any failure becomes a ValueError that says what
    was given. SGLang turns ValueErrors of a request into 400.
Upstream: sglang/srt/utils/video_decoder.py, sglang/srt/entrypoints/openai/serving_base.py handle_request.
Versions: 0.5.23. Remove when the wrapper raises ValueErrors of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _last_line(error: Exception) -> str:
    """The decoder's own words, without its stack trace."""
    lines = [line.strip() for line in str(error).split("Stack trace")[0].splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__


def _open(original: Callable[..., None], self: Any, source: Any, *args: Any, **kwargs: Any) -> None:
    what = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes) and not source:
        raise ValueError("the video is empty: got 0 bytes, needs a video file")
    try:
        original(self, source, *args, **kwargs)
    except Exception as error:
        raise ValueError(f"not a video, or truncated: no decoder opens it ({what}: {_last_line(error)})") from error


def _frames(original: Callable[..., Any], self: Any, indices: list[int]) -> Any:
    try:
        return original(self, indices)
    except Exception as error:
        raise ValueError(
            f"the video is truncated or damaged: reading {len(indices)} of its {len(self)} frames failed "
            f"({_last_line(error)})"
        ) from error


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    wrapper = "sglang.srt.utils.video_decoder.VideoDecoderWrapper."
    HookRegistry.register(wrapper + "__init__", _open, HookType.AROUND)
    HookRegistry.register(wrapper + "get_frames_as_tensor", _frames, HookType.AROUND)
