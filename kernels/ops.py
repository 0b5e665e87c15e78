"""The stages as one set of operations: a reference and a GPU twin of each, with the same signatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from mm_sglang.kernels.stages import stage


@dataclass(frozen=True, kw_only=True, eq=False)
class Ops:
    """What planning calls; each field's signature is that of the function of this name in the reference modules."""

    sampled_mass: Callable[..., Any]
    top_budget: Callable[..., Any]
    top_buckets: Callable[..., Any]
    pool: Callable[..., Any]
    clusters: Callable[..., Any]
    key_order: Callable[..., Any]
    limits: Callable[..., Any]
    tile_lists: Callable[..., Any]
    residual: Callable[..., Any]
    row_lse: Callable[..., Any]


def _timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with stage(name):
            return function(*arguments)

    return call


@cache
def reference_ops() -> Ops:
    """torch, fp32 inside, any device; slow, short, the yardstick."""
    from mm_sglang.kernels.estimate import blocks_reference
    from mm_sglang.kernels.estimate import reference as estimate
    from mm_sglang.kernels.merge import residual_reference
    from mm_sglang.kernels.permute import reference as permute
    from mm_sglang.kernels.select import reference as select
    from mm_sglang.kernels.tiles import reference as tiles

    return Ops(
        sampled_mass=estimate.sampled_mass, top_budget=select.top_budget, top_buckets=select.top_buckets,
        pool=blocks_reference.pool, clusters=blocks_reference.clusters, key_order=permute.key_order,
        limits=tiles.limits, tile_lists=tiles.tile_lists, residual=residual_reference.residual,
        row_lse=estimate.row_lse,
    )  # fmt: skip


@cache
def triton_ops() -> Ops:
    """Triton on a CUDA device (or in Triton's interpreter, for tests); never waits for the device."""
    from mm_sglang.kernels.estimate import blocks_gpu
    from mm_sglang.kernels.estimate import gpu as estimate
    from mm_sglang.kernels.merge import residual_gpu
    from mm_sglang.kernels.permute import gpu as permute
    from mm_sglang.kernels.select import gpu as select
    from mm_sglang.kernels.tiles import gpu as tiles

    return Ops(
        sampled_mass=_timed("estimate", estimate.sampled_mass),
        top_budget=_timed("select", select.top_budget),
        top_buckets=_timed("select", select.top_buckets),
        pool=_timed("estimate", blocks_gpu.pool),
        clusters=_timed("estimate", blocks_gpu.clusters),
        key_order=_timed("permute", permute.key_order),
        limits=_timed("plan", tiles.limits),
        tile_lists=_timed("plan", tiles.tile_lists),
        residual=_timed("merge", residual_gpu.residual),
        row_lse=estimate.row_lse,
    )
