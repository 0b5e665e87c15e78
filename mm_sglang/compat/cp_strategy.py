"""SGLang's runner shards prefills by our strategy.

Why: upstream's zigzag cuts where it likes, so that a tile of 128 queries would be two ranks' and its result depend on
    their number; its interleave deals out single tokens and does not serve GQA at all.
How: `sglang.srt.layers.cp.base._STRATEGY`, which `get_cp_strategy` returns and makes only if it is None, is set to
    mm_sglang.context_parallel.strategy.BlockStrategy when the backend starts, before the first batch.
Upstream: sglang/srt/layers/cp/base.py init_cp_strategy, get_cp_strategy (a closed list of two names).
Versions: 0.5.23. Remove when strategies can be registered by name.
"""

from __future__ import annotations

from typing import Any


def install(strategy: Any) -> None:
    from sglang.srt.layers.cp import base

    base._STRATEGY = strategy
