"""mp4 input on the plain-CPU platform.

Why: the video decoder and Qwen-VL's `preprocess_video` pin their frames' memory unless SGLANG_USE_CPU_ENGINE=1 says
    that this is a CPU; without an accelerator pinning raises ("Cannot access accelerator device when none is
    available", HTTP 500), and that variable would also switch on `sgl_kernel`'s CPU build, which is not on PyPI.
How: `torch.Tensor.pin_memory` returns the tensor itself, in processes of this platform only. One patch for both
    places; a hook on the second would import every model of SGLang in every process.
Upstream: sglang/srt/utils/video_decoder.py get_frames_as_tensor, sglang/srt/multimodal/processors/qwen_vl.py
    preprocess_video.
Versions: 0.5.23. Remove when both ask `is_pin_memory_available`.
"""

from __future__ import annotations

import torch


def _same(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return tensor


def install() -> None:
    if not torch.accelerator.is_available():
        torch.Tensor.pin_memory = _same  # type: ignore[method-assign, assignment]
