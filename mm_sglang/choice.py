"""Which engine runs: chosen once at start, logged with its reason, never changed in silence."""

from __future__ import annotations

import logging

import torch

from mm_sglang.kernels.engines import ENGINES, Engine, engine

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
