"""Engines execute a Plan. Which ones exist is data: name, planning operations, and why it can't run here (or None)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mm_sglang.kernels.attend import reference
from mm_sglang.kernels.ops import Ops, reference_ops, triton_ops

Attend = Callable[..., None]  # as kernels.attend.reference.attend


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to run a Plan; `missing` says why it can't on this machine, None if it can."""

    name: str
    attend: Attend
    ops: Callable[[], Ops]
    missing: Callable[[], str | None]
    note: str
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    device: str | None = None

    def check(self, q: torch.Tensor) -> None:
        """ValueError if these tensors are not for this engine."""
        if self.device is not None and q.device.type != self.device:
            raise ValueError(f"engine {self.name}: q on {q.device}: needs {self.device}")
        if self.dtypes is not None and q.dtype not in self.dtypes:
            raise ValueError(f"engine {self.name}: q is {q.dtype}: needs one of {self.dtypes}")
        if self.head_dims is not None and q.shape[2] not in self.head_dims:
            raise ValueError(f"engine {self.name}: head_dim={q.shape[2]}: needs one of {self.head_dims}")


def _fa4_missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        return f"{torch.cuda.get_device_name()} is SM{major}{minor}: this version was measured on SM90 only"
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return "package flash-attn-4 is not installed"
    return None


def _triton_missing() -> str | None:
    from mm_sglang.kernels.attend import triton_fwd

    if not torch.cuda.is_available() and not triton_fwd.INTERPRETED:
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def _lazy(module: str) -> Attend:
    def attend(*arguments: Any) -> None:
        importlib.import_module(f"mm_sglang.kernels.attend.{module}").attend(*arguments)

    return attend


HALF = (torch.bfloat16, torch.float16)
ENGINES = {
    "fa4": Engine(
        name="fa4", attend=_lazy("fa4"), ops=triton_ops, missing=_fa4_missing, dtypes=HALF, head_dims=(64, 128),
        device="cuda", note="FlashAttention-4's block-sparse kernel, 128 x 128 tiles, SM90",
    ),
    "triton": Engine(
        name="triton", attend=_lazy("triton_fwd"), ops=triton_ops, missing=_triton_missing,
        head_dims=(16, 32, 64, 128, 256), note="Triton, any CUDA GPU; its interpreter on a CPU, for tests",
    ),
    "reference": Engine(
        name="reference", attend=reference.attend, ops=reference_ops, missing=lambda: None,
        note="torch, fp32 inside, any device; the yardstick",
    ),
}  # fmt: skip


def engine(name: str) -> Engine:
    """The engine of that name; ValueError if there is none or it can't run here. Never another one instead."""
    if name not in ENGINES:
        raise ValueError(f"engine={name!r}: needs one of {tuple(ENGINES)}")
    reason = ENGINES[name].missing()
    if reason is not None:
        raise ValueError(f"engine={name!r} can't run here: {reason}")
    return ENGINES[name]
