"""SGLang's batches, taken apart: which rows are whose, and the part that is left to the dense side."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mm_sglang.kernels.layout import TokenLayout, upload

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseChunk:
    """One request's share of a batch that is prefilled sparsely: rows [start, end) are positions [prefix, ...).

    slots: int32 [layout.length] row of the KV pool that holds each position.
    dense: every layer is (under context parallelism, where the dense backend can't have the chunk).
    """

    request: int
    rid: str
    start: int
    end: int
    layout: TokenLayout
    slots: torch.Tensor
    dense: bool = False


def host_lengths(batch: ForwardBatch) -> list[tuple[int, int]]:
    """(tokens of the chunk, keys with it) of each request, on the host (dummy batches have no copy there)."""
    chunk, keys = batch.extend_seq_lens_cpu, batch.seq_lens_cpu
    if chunk is None or keys is None:
        chunk, keys = batch.extend_seq_lens.tolist(), batch.seq_lens.tolist()
    return list(zip((int(n) for n in chunk), (int(n) for n in keys), strict=True))


def part_of_batch(batch: ForwardBatch, requests: list[int], rows: torch.Tensor) -> ForwardBatch:
    """A batch of some of the requests, as far as a dense backend's extend reads it.

    Args:
        requests: ascending numbers in the batch; rows: int64 their rows, on the batch's device.
    """
    part = copy.copy(batch)
    part.batch_size = len(requests)
    index = upload(torch.tensor(requests), rows.device)
    for name in ("req_pool_indices", "seq_lens", "extend_prefix_lens", "extend_seq_lens"):
        setattr(part, name, getattr(batch, name)[index])
    part.seq_lens_cpu = batch.seq_lens_cpu[torch.tensor(requests)]
    part.seq_lens_sum = int(part.seq_lens_cpu.sum())
    for name in ("extend_prefix_lens_cpu", "extend_seq_lens_cpu"):
        setattr(part, name, [getattr(batch, name)[n] for n in requests])
    part.extend_num_tokens = len(rows)
    part.extend_start_loc = torch.cumsum(part.extend_seq_lens, 0) - part.extend_seq_lens
    part.out_cache_loc = batch.out_cache_loc[rows]
    return part
