"""What a server with --attn-cp-size above 1 needs before its first batch, or why it can't be had."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from sglang.srt.runtime_context import get_mm, get_parallel, get_schedule

from mm_sglang.compat import cp_body, cp_inputs, cp_strategy
from mm_sglang.config import SparseConfig
from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.context_parallel.strategy import KIND, BlockStrategy

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

log = logging.getLogger(__name__)


def start_ranks(runner: ModelRunner, config: SparseConfig) -> Ranks | None:
    """The context-parallel ranks, SGLang's runner and model prepared for them; None without context parallelism.

    Raises:
        ValueError: what does not go with it, or a model whose forward was not read for it.
    """
    parallel = get_parallel()
    size = parallel.attn_cp_size
    if size == 1:
        return None
    wide = f"--tp-size {parallel.tp_size}"
    for unfit, given, needed in (
        (not parallel.enable_prefill_cp, "no --enable-prefill-cp", "it"),
        (parallel.tp_size != size, wide, f"--tp-size {size}: tensor parallelism beside it is not there"),
        (not get_mm().mm_enable_dp_encoder, "no --mm-enable-dp-encoder", "it, for the vision tower's frames"),
        (parallel.pp_size > 1, f"--pp-size {parallel.pp_size}", "1"),
        (get_schedule().enable_mixed_chunk, "--enable-mixed-chunk", "none: a decode step has no rows to spread"),
        (config.trace and config.trace.tensors, "trace: tensors", "none: a rank has its own queries only"),
    ):
        if unfit:
            raise ValueError(f"mm_sparse: --attn-cp-size {size} with {given}: needs {needed}")
    group = parallel.attn_cp_group
    ranks = Ranks(rank=parallel.attn_cp_rank, size=size, group=group.device_group, cpu_group=group.cpu_group)
    cp_inputs.install(runner.model)
    cp_body.wrap_forward(runner.model.model)
    cp_strategy.install(BlockStrategy(ranks, parallel.cp_strategy, torch.device(runner.device)))
    log.info("mm_sparse: prefills spread over %d ranks by %s of 128 tokens", size, KIND[parallel.cp_strategy])
    return ranks
