"""SGLang takes a video's frames from Ray decoders instead of decoding the file itself.

Why: SGLang decodes and resizes a whole video in the replica's one tokenizer process, and holds every sampled frame at
    its full size meanwhile. Frames handed over as an array lose the video's frame rate, hence its timestamps.
How: AROUND `sglang.srt.utils.common.load_video`: a name that begins with SCHEME becomes a DecodedVideo. AROUND
    `sglang.srt.multimodal.processors.qwen_vl.preprocess_video`: run once on tensors without content, it says which
    frames and which size it wants; those are fetched, and the real run finds them resized.
Upstream: sglang/srt/utils/common.py, sglang/srt/multimodal/processors/qwen_vl.py; sgl-project/sglang#31828 asks for it.
Versions: 0.5.23. Remove when frames that were sampled elsewhere are taken with their metadata. Installed in a replica's
    leader only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mm_sglang.parallel.decoding import Decoders, VideoFacts

SCHEME = "mm-sglang-decoded:"


def install(decoders: Decoders, host: str, progress: Callable[[str, int, int], None]) -> None:
    """Before load_plugins, which applies the hooks. `progress` hears of (rid, frames there, frames wanted)."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    class DecodedVideo(VideoDecoderWrapper):  # type: ignore[misc]
        """Knows the video's facts; has frames once `fetch` has run."""

        def __init__(self, rid: str, path: str, facts: VideoFacts) -> None:
            self.rid, self.path, self.facts = rid, path, facts
            self.frames: Any = None

        def __len__(self) -> int:
            return self.facts.frames

        @property
        def avg_fps(self) -> float:
            return self.facts.fps

        def get_frames_as_tensor(self, indices: list[int]) -> Any:
            import torch

            if self.frames is not None:
                return torch.from_numpy(self.frames)
            shape = (len(indices), self.facts.height, self.facts.width, 3)
            return torch.empty(shape, dtype=torch.uint8, device="meta")

        def fetch(self, wanted: list[int], size: tuple[int, int]) -> None:
            self.frames = decoders.decode(
                self.path, self.facts, wanted, size, host, lambda there: progress(self.rid, there, len(wanted))
            )

        def close(self) -> None:
            self.frames = None

    def load(original: Callable[..., Any], video_file: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(video_file, str) or not video_file.startswith(SCHEME):
            return original(video_file, *args, **kwargs)
        rid, _, path = video_file.removeprefix(SCHEME).partition(":")
        return DecodedVideo(rid, path, decoders.facts(path))

    async def preprocess(original: Callable[..., Any], vr: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(vr, DecodedVideo):
            planned, metadata = await original(vr, *args, **kwargs)  # [frames, 3, height, width], no content
            wanted = [int(index) for index in metadata["frames_indices"]]
            await asyncio.to_thread(vr.fetch, wanted, tuple(planned.shape[-2:]))
        return await original(vr, *args, **kwargs)

    HookRegistry.register("sglang.srt.utils.common.load_video", load, HookType.AROUND)
    HookRegistry.register("sglang.srt.multimodal.processors.qwen_vl.preprocess_video", preprocess, HookType.AROUND)
