"""SGLang's ContextParallelStrategy in whole blocks of 128 rows: how its runner shards and gathers a batch for us.

Legend: N ranks, T rows of the batch, W rows of a rank, filled up to the same number on all of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.cp.base import (
    BaseContextParallelMetadata,
    ContextParallelStrategy,
    ContextParallelStrategyKind,
)
from sglang.srt.layers.cp.padding import pad_local_rows

from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.kernels.layout import upload
from mm_sglang.kernels.plan import TILE
from mm_sglang.parallel.sharding import Sharding, blocks_of

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

log = logging.getLogger(__name__)
# --cp-strategy's names. Upstream's interleave deals out tokens, which would leave every rank a part of every tile.
KIND = {"interleave": "stripe", "zigzag": "zigzag"}


@dataclass(kw_only=True)
class Metadata(BaseContextParallelMetadata):  # type: ignore[misc]
    """A batch's sharding, and the lists of row numbers that SGLang's padding reads and writes.

    rows: int64 [W] batch rows of this rank; inverse: int64 [T] row of the all-gather, on the device.
    """

    sharding: Sharding
    rows: torch.Tensor
    inverse: torch.Tensor | None = None
    per_rank_actual_token: list[int]
    per_rank_logical_token: list[int] | None = None
    max_rank_len: list[int]

    @property
    def width(self) -> int:
        return self.per_rank_actual_token[0]


class BlockStrategy(ContextParallelStrategy):  # type: ignore[misc]
    """Owns the rows of a prefill in blocks; attention, and K and V, are the backend's (attention.py)."""

    name = "mm_sparse blocks"

    def __init__(self, ranks: Ranks, cp_strategy: str, device: torch.device) -> None:
        super().__init__(cp_size=ranks.size)
        self.ranks, self.sharding_kind, self.device = ranks, KIND[cp_strategy], device
        self.kind = ContextParallelStrategyKind.from_string(cp_strategy)  # decides how far SGLang fills up a rank

    def can_apply(self, num_tokens: int, forward_batch: ForwardBatch) -> bool:
        """Whether there is a block for every rank, and no rank has more rows, filled up, than the batch.

        SGLang cuts what it hands to a backend to the batch's rows. Smaller batches run replicated, as upstream's do.
        """
        lengths = getattr(forward_batch, "extend_seq_lens_cpu", None)
        if lengths is None or not forward_batch.forward_mode.is_context_parallel_extend():
            return False
        fits = _fits(tuple(int(n) for n in lengths), self.cp_size, self.sharding_kind)
        if not fits:
            _say_replicated(self.cp_size)
        return fits

    def build_metadata(
        self, num_tokens: int, seqs_len: list[int] | None, extend_seqs_len: list[int] | None = None
    ) -> Metadata:
        lengths = tuple(int(n) for n in extend_seqs_len or seqs_len or [num_tokens])
        if sum(lengths) != num_tokens:
            raise ValueError(f"chunks of {lengths} rows: needs {num_tokens} together, as the batch has tokens")
        sharding = Sharding(lengths=lengths, size=self.cp_size, kind=self.sharding_kind)
        return Metadata(
            total_seq_lens=num_tokens, bs=len(lengths), sharding=sharding,
            rows=upload(sharding.rows(self.ranks.rank), self.device),
            per_rank_actual_token=list(sharding.counts), max_rank_len=[max(sharding.counts)] * self.cp_size,
        )  # fmt: skip

    def shard_hidden_states(self, x: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, ...] -> this rank's rows, filled up with zeros to [W, ...]."""
        meta = forward_batch.attn_cp_metadata
        return pad_local_rows(x.index_select(0, meta.rows), meta, dim=0)  # type: ignore[no-any-return]

    def shard_position_ids(self, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T] or mrope's [3, T] -> [W] or [3, W]."""
        meta = forward_batch.attn_cp_metadata
        return pad_local_rows(positions.index_select(-1, meta.rows), meta, dim=-1)  # type: ignore[no-any-return]

    def gather_hidden_states(
        self, x: torch.Tensor, forward_batch: ForwardBatch, stream: object | None = None
    ) -> torch.Tensor:
        """[W, ...] of every rank -> [T, ...] in the batch's order."""
        meta = forward_batch.attn_cp_metadata
        if meta.inverse is None:
            meta.inverse = upload(meta.sharding.inverse(meta.width), x.device)
        return self.ranks.gather(x)().index_select(0, meta.inverse)

    def gather_kv_cache(self, x: torch.Tensor, forward_batch: ForwardBatch, stream: object | None = None) -> Any:
        return self.gather_hidden_states(x, forward_batch, stream)

    def _not_ours(self, *args: object, **kwargs: object) -> Any:
        raise RuntimeError("mm_sparse gathers and attends in its own backend: needs --attention-backend mm_sparse")

    run_attention = materialize_full_kv = materialize_full_mla_kv = _not_ours


@lru_cache(maxsize=64)  # SGLang asks many times a batch
def _fits(lengths: tuple[int, ...], size: int, kind: str) -> bool:
    if sum(map(blocks_of, lengths)) < size:
        return False
    fullest = max(Sharding(lengths=lengths, size=size, kind=kind).counts)
    return -(-fullest // (2 * size)) * 2 * size <= sum(lengths)  # padding.get_cp_padding_align_size, at most


@cache
def _say_replicated(size: int) -> None:
    log.info(
        "mm_sparse: context parallelism, said once: batches of fewer than %d blocks of %d tokens, one a rank, or "
        "nearly all of one rank's, are computed on every rank", size, TILE,
    )  # fmt: skip
