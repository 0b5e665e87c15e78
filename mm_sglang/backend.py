"""The attention backend `mm_sparse`: SGLang's ForwardBatch in, kernels.prefill out.

A wrapped dense backend does decode, short prompts and whole dense layers; a dense head in a layer of mixed heads is a
`dense` recipe of the same plan, because SGLang's backends take all heads of a layer or none.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel

from mm_sglang.config import SparseConfig
from mm_sglang.kernels.engines import Engine, engine
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.layout import layout_from_sglang, require_known_architecture
from mm_sglang.parallel.heads import local_heads
from mm_sglang.trace import Tracer

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class SparseChunk:
    """One request's share of a batch that is prefilled sparsely: rows [start, end) are positions [prefix, ...)."""

    request: int
    rid: str
    start: int
    end: int
    layout: TokenLayout

    @property
    def prefix(self) -> int:
        return self.layout.length - (self.end - self.start)


class MMSparseBackend(AttentionBackend):  # type: ignore[misc]
    """Sparse prefill around a dense backend. Refuses at start what it can't serve; never runs dense in silence."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        model = runner.model_config
        self.config = SparseConfig.from_settings(getattr(model.hf_config, "mm_sparse", None))
        require_known_architecture(model.hf_config.architectures)
        layers, heads = model.num_hidden_layers, model.num_attention_heads
        self.config.check_model(layers=layers, heads=heads)
        self.engine = choose_engine(self.config.engine, str(runner.device))
        for unfit, what in (
            (runner.sliding_window_size, "sliding-window attention"),
            (not runner.spec_algorithm.is_none(), "speculative decoding"),
            (get_parallel().attn_cp_size > 1, "context parallelism"),
        ):
            if unfit:
                raise ValueError(f"mm_sparse does not serve {what}: needs a launch without it")

        rank, size = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
        mine = local_heads(heads, rank, size)
        recipes = [self.config.patterns(layer, heads) for layer in range(layers)]
        self.recipes = [None if r is None else r[mine.start : mine.stop] for r in recipes]
        self.merge = int(model.hf_config.vision_config.spatial_merge_size)
        self.tracer = Tracer(self.config.trace, rank=rank, first_head=mine.start) if self.config.trace else None
        self.dense = TorchNativeAttnBackend(runner)
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.chunks: list[SparseChunk] = []
        self.dense_rows: torch.Tensor | None = None
        self.dense_batch: ForwardBatch | None = None
        self._said: set[str] = set()
        log.info(
            "mm_sparse: %d of %d layers sparse, min_tokens %d, dense backend torch_native, heads %d..%d of %d",
            sum(r is not None for r in self.recipes), layers, self.config.min_tokens, mine.start, mine.stop - 1, heads,
        )  # fmt: skip

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Split the batch into sparse chunks and the rest. The only place where mm_inputs can still be read."""
        self.dense.init_forward_metadata(forward_batch)
        self.chunks, self.dense_rows, self.dense_batch = [], None, None
        if forward_batch.forward_mode not in (ForwardMode.EXTEND, ForwardMode.MIXED):
            return
        lengths = forward_batch.extend_seq_lens.tolist()
        rest, rest_rows, start = [], [], 0
        for request, (length, keys) in enumerate(zip(lengths, forward_batch.seq_lens.tolist(), strict=True)):
            end = start + length
            layout = self._layout_or_reason(forward_batch, request, length, keys)
            if isinstance(layout, TokenLayout):
                rid = forward_batch.rids[request] if forward_batch.rids else str(request)
                self.chunks.append(SparseChunk(request=request, rid=rid, start=start, end=end, layout=layout))
            else:
                self._say_once(*layout)
                rest.append(request)
                rest_rows.append(torch.arange(start, end))
            start = end
        if self.chunks and rest:
            self.dense_rows = torch.cat(rest_rows)
            self.dense_batch = part_of_batch(forward_batch, torch.tensor(rest), self.dense_rows)

    def _say_once(self, reason: str, detail: str = "") -> None:
        if reason not in self._said:
            self._said.add(reason)
            log.info("mm_sparse: dense prefill of some chunks, said once: %s%s", reason, detail)

    def _layout_or_reason(
        self, batch: ForwardBatch, request: int, length: int, keys: int
    ) -> TokenLayout | tuple[str, ...]:
        """The chunk's layout, or why it is left to the dense backend: a fixed reason, and a detail of this one."""
        if length == 1:  # MIXED batches carry decode steps as chunks of one; one row has no tiles to save
            return ("a chunk of one token (decode in a mixed batch)",)
        if keys < self.config.min_tokens:
            return (f"fewer keys than min_tokens={self.config.min_tokens}",)
        inputs = batch.mm_inputs[request] if batch.mm_inputs else None
        try:
            return layout_from_sglang(inputs, keys, self.merge)
        except ValueError as error:  # one odd request must not stop the server
            return ("no token layout: ", str(error))

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """[tokens, heads * head_dim] of the whole batch; writes K and V into the pool first."""
        recipes = self.recipes[layer.layer_id]
        if recipes is None or not self.chunks:
            return self.dense.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)  # type: ignore[no-any-return]
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        key_pool, value_pool = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        out = torch.empty_like(q)
        if self.dense_rows is not None:
            rows = self.dense_rows
            out[rows] = self.dense.forward_extend(q[rows], None, None, layer, self.dense_batch, save_kv_cache=False)
        heads = (layer.tp_q_head_num, layer.head_dim)
        for chunk in self.chunks:
            index = forward_batch.req_pool_indices[chunk.request]
            slots = self.req_to_token_pool.req_to_token[index, : chunk.layout.length].int()
            chunk_q = q[chunk.start : chunk.end].view(-1, *heads)
            attended, _, plan = sparse_prefill(
                chunk_q, key_pool, value_pool, slots=slots, layout=chunk.layout, patterns=recipes, scale=layer.scaling,
                engine=self.engine, out=out[chunk.start : chunk.end].view(-1, *heads),
            )  # fmt: skip
            if self.tracer:
                self.tracer.record(
                    chunk.rid,
                    layer.layer_id,
                    chunk.layout,
                    plan,
                    (chunk_q, *(x[slots] for x in (key_pool, value_pool)), attended),
                )
        return out

    def forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.dense.forward_decode(*args, **kwargs)  # type: ignore[no-any-return]


def choose_engine(name: str, device: str) -> Engine:
    """The engine asked for, or for "auto" the device's own; logged with the reason. Raises ValueError if none fits."""
    if device != "cpu":
        raise ValueError(f"mm_sparse on device {device!r}: this version has no kernels for it, needs --device cpu")
    chosen = engine("reference" if name == "auto" else name)
    log.info(
        "mm_sparse: engine %s: %s", chosen.name, f"the one for {device}" if name == "auto" else "asked for by name"
    )
    return chosen


def part_of_batch(batch: ForwardBatch, requests: torch.Tensor, rows: torch.Tensor) -> ForwardBatch:
    """A batch of some of the requests, as far as a dense backend's extend reads it."""
    part = copy.copy(batch)
    part.batch_size = len(requests)
    for name in ("req_pool_indices", "seq_lens", "seq_lens_cpu", "extend_prefix_lens", "extend_seq_lens"):
        setattr(part, name, getattr(batch, name)[requests])
    part.extend_start_loc = torch.cumsum(part.extend_seq_lens, 0) - part.extend_seq_lens
    part.out_cache_loc = batch.out_cache_loc[rows]
    return part
