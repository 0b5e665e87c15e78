"""Which engine runs: chosen once at start, logged with its reason, never changed in silence."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from mm_sglang.kernels.engines import ENGINES, Engine, engine

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

log = logging.getLogger(__name__)
CUDA_MAJORS = (8, 9)  # SM80 to SM90: what the dense prefill backend, FA3, runs on


def choose_engine(name: str, device: str) -> Engine:
    """The engine asked for, or for "auto" the device's own; logged with the reason. Raises ValueError if none fits."""
    if name != "auto":
        chosen, reason = engine(name), "asked for by name"
    elif torch.device(device).type == "cpu":
        chosen, reason = engine("reference"), "the one for a CPU"
    elif (missing := ENGINES["fa4"].missing()) is None:
        chosen, reason = engine("fa4"), f"the fastest on {torch.cuda.get_device_name()}"
    else:
        chosen, reason = engine("triton"), f"fa4 can't run here: {missing}"
    if chosen.device is not None and chosen.device != torch.device(device).type:
        raise ValueError(f"mm_sparse: engine={chosen.name!r} on device {device!r}: needs {chosen.device}")
    log.info("mm_sparse: engine %s: %s", chosen.name, reason)
    return chosen


def check_engine(chosen: Engine, dtype: torch.dtype, head_dim: int) -> None:
    """ValueError at start rather than at the first prompt."""
    if chosen.dtypes is not None and dtype not in chosen.dtypes:
        raise ValueError(f"mm_sparse: engine {chosen.name}: the model runs in {dtype}: needs one of {chosen.dtypes}")
    if chosen.head_dims is not None and head_dim not in chosen.head_dims:
        raise ValueError(f"mm_sparse: engine {chosen.name}: head_dim={head_dim}: needs one of {chosen.head_dims}")


def check_attention(runner: ModelRunner) -> None:
    """ValueError at start if a model's attention, or what a launch makes of it, is none that the kernels compute."""
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    layers = [module for module in runner.model.modules() if isinstance(module, RadixAttention)]
    for unfit, what in (
        (runner.sliding_window_size or any(x.sliding_window_size > 0 for x in layers), "sliding-window attention"),
        (runner.use_mla_backend, "multi-head latent attention"),
        (any(layer.logit_cap for layer in layers), "a soft cap on attention's logits"),
        (any(layer.v_head_dim != layer.head_dim for layer in layers), "values of another width than keys"),
        (
            any(x.is_cross_attention or x.attn_type != AttentionType.DECODER for x in layers),
            "other than causal attention",
        ),
        (not runner.spec_algorithm.is_none(), "speculative decoding"),
        (runner.kv_cache_dtype != runner.dtype, f"a KV cache of {runner.kv_cache_dtype} for {runner.dtype}"),
    ):
        if unfit:
            raise ValueError(f"mm_sparse does not serve {what}: needs a model and a launch without it")
