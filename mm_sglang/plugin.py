"""SGLang's entry point `sglang.srt.plugins`: registers the backend name and installs the hooks of compat/.

SGLang calls `register` in every process and only logs what it raises. That is why the backend has a name of its own:
if this fails, `--attention-backend mm_sparse` is an invalid choice and no server starts, let alone a dense one.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mm_sglang.compat import require_supported_sglang
from mm_sglang.cpu.activate import NAME as CPU_PLATFORM

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

    from mm_sglang.backend import MMSparseBackend

BACKEND = "mm_sparse"


def register() -> None:
    """Make `--attention-backend mm_sparse` known. Raises ValueError on a version of SGLang that was not tested."""
    require_supported_sglang()
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    add_attention_backend_choices([BACKEND])

    @register_attention_backend(BACKEND)  # type: ignore[untyped-decorator]
    def create(runner: ModelRunner) -> MMSparseBackend:
        from mm_sglang.backend import MMSparseBackend

        return MMSparseBackend(runner)

    from mm_sglang.compat import cp_body, pinned_positions, qwen2_5_vl_frames, uint8_pixels, video_errors

    cp_body.install()
    pinned_positions.install()
    qwen2_5_vl_frames.install()
    uint8_pixels.install()
    video_errors.install()
    if os.environ.get("SGLANG_PLATFORM") == CPU_PLATFORM:
        from mm_sglang.compat import cpu_current_stream, cpu_last_loc, cpu_pin_memory, cpu_vision_segments

        cpu_current_stream.install()
        cpu_last_loc.install()
        cpu_pin_memory.install()
        cpu_vision_segments.install()
