"""Context parallelism on the plain-CPU platform.

Why: after a context-parallel forward the runner asks for `torch.cuda.current_stream()` on every platform; a CPU build
    of torch raises "Torch not compiled with CUDA enabled". Nothing uses the stream.
How: `torch.cuda.current_stream` returns None, in processes of this platform only.
Upstream: sglang/srt/model_executor/runner/eager_runner.py _execute_extend_cp.
Versions: 0.5.23. Remove when it asks `torch.get_device_module`.
"""

from __future__ import annotations

import torch


def _none(device: object = None) -> None:
    return None


def install() -> None:
    if not torch.accelerator.is_available():
        torch.cuda.current_stream = _none  # type: ignore[assignment]
