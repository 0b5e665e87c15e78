"""Page sizes above 1 on the plain-CPU platform.

Why: `get_last_loc` takes its Triton kernel for every backend but torch_native and ascend, by name, without asking the
    platform whether Triton runs there; with `mm_sparse` and page_size > 1 the allocator then fails to launch it.
How: REPLACE `sglang.srt.mem_cache.allocation.get_last_loc` by SGLang's own torch variant beside it.
Upstream: sglang/srt/mem_cache/allocation.py, get_last_loc (0.5.23 asks `support_triton` elsewhere in that file).
Versions: 0.5.23. Remove when get_last_loc asks the platform's capabilities too.
"""

from __future__ import annotations


def install() -> None:
    from sglang.srt.mem_cache.allocation import get_last_loc_torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.mem_cache.allocation.get_last_loc", get_last_loc_torch, HookType.REPLACE)
