"""What `python -m benchmarks.scaling` runs on a number of GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.ttft.parts import spec

PART = "scaling"


def specs(
    gpus: int, lengths: list[int], layers: int, chunk: int, only: list[str], folder: Path
) -> list[dict[str, Any]]:
    """For benchmarks.ttft.child: mm_sparse over `gpus` ranks, with a profile of the longest prompt, and stock.

    only: those of both that are wanted.

    Stock on several GPUs is tensor parallelism with FA3. Its own zigzag context parallelism does not serve
    vision-language models (the runner embeds ids above the vocabulary), and Qwen2.5's attention is wrong under it.
    """
    ours, stock = (spec(PART, who, lengths, folder, layers=layers, chunk=chunk) for who in ("mm_sparse", "stock"))
    ours |= {"profile": lengths[-1], "repeats": 2}  # the first of a length compiles a few kernels
    if gpus > 1:
        ours["arguments"] |= {
            "tp_size": gpus, "attn_cp_size": gpus, "enable_prefill_cp": True, "cp_strategy": "interleave",
            "mm_enable_dp_encoder": True, "cuda_graph_backend_prefill": "disabled",
        }  # fmt: skip
        stock["arguments"] |= {"tp_size": gpus}
    return [one for one in (ours, stock) if one["name"] in only]
