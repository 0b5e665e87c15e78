"""The language model of Qwen2.5-VL and Qwen3-VL under context parallelism: whole weights on every rank.

Why: SGLang's Qwen2 splits heads and MLP over --tp-size, which counts the context-parallel ranks too: each would attend
    with a part of the heads to its part of the rows, and be wrong without an error. Qwen3 splits its attention right,
    but gathers all rows for the MLP in every layer: 14 KB a token beside the 2 KB of K and V that have to move.
How: AROUND `Qwen2Model.__init__` (Qwen3's and Qwen3-VL's bodies derive from it): it is built under `get_parallel()
    .override` as if there were one rank, so that no layer's boundary communicates. The forward of that very model is
    wrapped the same way when the backend starts, because boundaries ask again at run time. Only with mm_sparse.
    Hooks on Qwen2Attention and Qwen2MLP alone gave wrong tokens: the boundaries between them still moved rows.
Upstream: sglang/srt/models/qwen2.py Qwen2Model, Qwen2Attention; sglang/srt/layers/layer_boundary/ variant_for.
Versions: 0.5.23. Remove when Qwen2 uses attn_tp_size and dense MLPs can run on a rank's own rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from mm_sglang.compat import mm_sparse_prefills


def _alone() -> AbstractContextManager[Any]:
    """SGLang's parallel state, for what is inside, as on a single rank."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    one = parallel.attn_tp_group  # of one rank: the backend refuses tensor parallelism beside context parallelism
    values = {"tp_size": 1, "tp_rank": 0, "tp_group": one, "enable_prefill_cp": False}
    for name in ("attn_cp", "moe_tp", "moe_dp"):
        values |= {f"{name}_size": 1, f"{name}_rank": 0, f"{name}_group": one}
    return parallel.override(**values)  # type: ignore[no-any-return]


def _wanted() -> bool:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return bool(parallel.attn_cp_size > 1 and parallel.enable_prefill_cp and mm_sparse_prefills())


def _init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    if not _wanted():
        return original(self, *args, **kwargs)
    with _alone():
        return original(self, *args, **kwargs)


def wrap_forward(body: Any) -> None:
    """Run this model body as on a single rank, in every batch."""
    original = body.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _alone():
            return original(*args, **kwargs)

    body.forward = forward


def install() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.models.qwen2.Qwen2Model.__init__", _init, HookType.AROUND)
