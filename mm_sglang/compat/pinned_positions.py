"""The host prepares a prefill chunk while the device still computes the one before.

Why: SGLang starts a chunk's batch while its predecessor runs, and pins what it sends for that, all but mrope positions:
    three numbers a token from pageable memory, whose copy makes the host wait until the device gets there. So the
    device waits in turn, at each chunk of a long video, until the host has prepared and launched the rest.
How: AROUND `ForwardBatch._compute_mrope_positions_extend`: it makes them on the CPU, and they are sent from pinned
    memory. Only with mm_sparse.
Upstream: sglang/srt/model_executor/forward_batch_info.py _compute_mrope_positions_extend.
Versions: 0.5.23. Remove when SGLang pins them as it does the other inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from mm_sglang.compat import mm_sparse_prefills


def _extend(original: Callable[..., None], self: Any, model_runner: Any, batch: Any) -> None:
    from mm_sglang.kernels.layout import upload

    if not mm_sparse_prefills():
        return original(self, model_runner, batch)
    original(self, SimpleNamespace(device="cpu"), batch)  # it reads nothing else of the runner
    self.mrope_positions = upload(self.mrope_positions, model_runner.device)


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_executor.forward_batch_info.ForwardBatch._compute_mrope_positions_extend"
    HookRegistry.register(target, _extend, HookType.AROUND)
