"""Engines execute a Plan. Which ones exist is data: name, and a probe that says why it can't run here (or None)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mm_sglang.kernels.attend import reference
from mm_sglang.kernels.plan import Plan

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Plan, float], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to run a Plan; `missing` says why it can't on this machine, None if it can."""

    name: str
    attend: Attend
    missing: Callable[[], str | None]
    note: str


ENGINES = {
    "reference": Engine(
        name="reference",
        attend=reference.attend,
        missing=lambda: None,
        note="torch, fp32 inside, any device; the yardstick",
    ),
}


def engine(name: str) -> Engine:
    """The engine of that name; ValueError if there is none or it can't run here. Never another one instead."""
    if name not in ENGINES:
        raise ValueError(f"engine={name!r}: needs one of {tuple(ENGINES)} in this version")
    reason = ENGINES[name].missing()
    if reason is not None:
        raise ValueError(f"engine={name!r} can't run here: {reason}")
    return ENGINES[name]
