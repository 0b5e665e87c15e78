"""What we measure against. A rival that can't run here is named with the reason, never left out in silence."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from benchmarks.kernels import minference

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _as_is(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return q, k, v


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another attention kernel.

    Args:
        name: as in the table.
        dense: causal attention over all keys; else vertical-slash at the paper's budgets.
        package: distribution whose version is recorded.
        probe: why it can't run here, or None.
        run: (prepared, scale) -> out [N, H, D] or anything of it; what is timed.
        prepare: (q [N, H, D], k, v [N, Hkv, D]) -> the layout it wants; not timed.
    """

    name: str
    dense: bool
    package: str
    probe: Callable[[], str | None]
    run: Callable[[Any, float], torch.Tensor]
    prepare: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any] = _as_is

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def _importing(load: Callable[[], Any]) -> Callable[[], str | None]:
    def probe() -> str | None:
        try:
            load()
        except Exception as error:  # a package that is there but broken raises anything; the table says what
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        return None

    return probe


def _load_fa4() -> Any:
    return importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd


def _fa4(tensors: Tensors, scale: float) -> torch.Tensor:
    q, k, v = (x[None] for x in tensors)
    out: torch.Tensor = _load_fa4()(q, k, v, softmax_scale=scale, causal=True)[0]
    return out[0]


def _load_fa3() -> Any:
    module = importlib.import_module("sgl_kernel.flash_attn")
    if not module.is_fa3_supported():
        raise RuntimeError("FA3 does not support this device")
    return module.flash_attn_with_kvcache


def _fa3(tensors: Tensors, scale: float) -> torch.Tensor:
    q, k, v = (x[None] for x in tensors)  # no sequence lengths: FA3's plain persistent kernel, not its varlen one
    out: torch.Tensor = _load_fa3()(q, k, v, softmax_scale=scale, causal=True, num_splits=1)
    return out[0]


def _load_cudnn() -> Any:
    if torch.backends.cudnn.version() is None:  # type: ignore[no-untyped-call]
        raise RuntimeError("this torch has no cuDNN")


def _cudnn(tensors: Tensors, scale: float) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x[None].transpose(1, 2) for x in tensors)
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


@cache
def _cudnn_knows_groups() -> bool:
    q, k = (torch.randn(256, heads, 128, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
    try:
        _cudnn((q, k, k), 128**-0.5)
    except RuntimeError:
        return False
    return True


def _cudnn_prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    """K and V copied out to every query head where torch's cuDNN path refuses grouped heads."""
    if _cudnn_knows_groups():
        return q, k, v
    group = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)


RIVALS = (
    Rival(name="FA4 dense", dense=True, package="flash-attn-4", probe=_importing(_load_fa4), run=_fa4),
    Rival(name="FA3 dense", dense=True, package="sglang-kernel", probe=_importing(_load_fa3), run=_fa3),
    Rival(name="cuDNN dense", dense=True, package="nvidia-cudnn-cu13", probe=_importing(_load_cudnn),
          run=_cudnn, prepare=_cudnn_prepare),
    Rival(
        name="MInference", dense=False, package="minference", probe=_importing(minference.load),
        run=minference.run, prepare=minference.prepare,
    ),
)  # fmt: skip


def check(rival: Rival, device: torch.device) -> str | None:
    """Why a rival that imports is not to be trusted here, or None: dense attention of 1024 fresh random tokens."""
    q, k, v = (torch.randn(1024, heads, 128, dtype=torch.bfloat16, device=device) for heads in (8, 2, 2))
    scale = 128**-0.5
    try:
        out = rival.run(rival.prepare(q, k, v), scale).float()
    except Exception as error:
        return f"failed on 1024 tokens: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
            :200
        ]
    keys, values = (x.float().repeat_interleave(4, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.float() * scale, keys)
    causal = torch.ones(1024, 1024, dtype=torch.bool, device=device).tril()
    want = torch.einsum("hqk,khd->qhd", logits.masked_fill(~causal, -torch.inf).softmax(2), values)
    wrong = float((out - want).norm() / want.norm())
    return None if wrong < 0.01 else f"wrong result on 1024 tokens: relative error {wrong:.3g}"
