"""The attention backend `mm_sparse`: SGLang's ForwardBatch in, kernels.prefill out.

A wrapped dense backend does decode, short prompts and whole dense layers; a dense head in a layer of mixed heads is a
`dense` recipe of the same plan, because SGLang's backends take all heads of a layer or none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.layers.cp.utils import is_cp_active
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_observability, get_parallel

from mm_sglang.auto import AutoHeads
from mm_sglang.batches import SparseChunk, host_lengths, part_of_batch
from mm_sglang.choice import check_attention, check_engine, choose_engine
from mm_sglang.compat.vision_slices import encode_in_slices
from mm_sglang.config import SparseConfig
from mm_sglang.context_parallel.attention import ChunkShare, SharedBatch
from mm_sglang.context_parallel.start import start_ranks
from mm_sglang.dense import DenseSide
from mm_sglang.guard import Recipes
from mm_sglang.kernels.classes import is_question
from mm_sglang.kernels.layout import TokenLayout, upload
from mm_sglang.kernels.patterns import Auto, Dense, HeadPattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.kernels.share import Share
from mm_sglang.layout import assumed_video, layout_from_sglang, require_known_architecture
from mm_sglang.long_video import encoded_again
from mm_sglang.metrics import Metrics
from mm_sglang.model_hash import require_same_model
from mm_sglang.parallel.heads import local_heads
from mm_sglang.trace import Tracer
from mm_sglang.watch import Done, Watch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

log = logging.getLogger(__name__)


class MMSparseBackend(AttentionBackend):  # type: ignore[misc]
    """Sparse prefill around a dense backend. Refuses at start what it can't serve; never runs dense in silence."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        model = runner.model_config
        self.config = SparseConfig.from_settings(getattr(model.hf_config, "mm_sparse", None))
        require_known_architecture(model.hf_config.architectures)
        layers, heads = model.num_hidden_layers, model.num_attention_heads
        self.config.check_model(layers=layers, heads=heads)
        require_same_model(self.config, model.model_path)
        self.engine = choose_engine(self.config.engine, str(runner.device))
        check_engine(self.engine, runner.dtype, model.head_dim)
        check_attention(runner)

        self.ranks = start_ranks(runner, self.config)
        encode_in_slices(getattr(runner.model, "visual", None), self.ranks)
        rank, size = get_parallel().attn_tp_rank, get_parallel().attn_tp_size
        mine = local_heads(heads, rank, size)
        rank = get_parallel().tp_rank
        recipes = [self.config.patterns(layer, heads) for layer in range(layers)]
        metered = bool(get_observability().enable_metrics)
        metrics = Metrics(on=metered and rank == 0)
        own = [None if r is None else r[mine.start : mine.stop] for r in recipes]
        self.watch = Watch(
            self.config, own, self.engine, metrics, cuda=torch.device(runner.device).type == "cuda", metered=metered,
            team=self.ranks, first_head=mine.start,
        )  # fmt: skip
        self.auto = AutoHeads(self.engine, metrics, tail=self.config.text_tail)
        if self.ranks is not None:
            self.auto.agree = self.ranks.agree
        self.merge = int(model.hf_config.vision_config.spatial_merge_size)
        self.model_configs = (model.hf_text_config, model.hf_config.vision_config)
        self.tracer = Tracer(self.config.trace, rank=rank, first_head=mine.start) if self.config.trace else None
        self.device = torch.device(runner.device)
        self.dense = DenseSide(runner)
        self.needs_cpu_seq_lens = True  # chunks are told apart on the host
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.chunks: list[SparseChunk] = []
        self.shared: SharedBatch | None = None
        self.whole_plan: Any = None
        self.dense_rows: torch.Tensor | None = None
        self.dense_batch: ForwardBatch | None = None
        self.dense_plan: Any = None
        self._said: set[str] = set()
        log.info(
            "mm_sparse: %d of %d layers sparse, min_tokens %d, dense backend %s, heads %d..%d of %d",
            sum(r is not None for r in own), layers, self.config.min_tokens, self.dense.name, mine.start,
            mine.stop - 1, heads,
        )  # fmt: skip
        if self.config.assume_video:
            log.warning(
                "mm_sparse: assume_video is on: prompts without media are laid out as video; for benchmarks only"
            )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Split the batch into sparse chunks and the rest. The only place where mm_inputs can still be read."""
        meta = forward_batch.attn_cp_metadata if is_cp_active(forward_batch) else None  # none while graphs are captured
        shared = self.ranks is not None and meta is not None
        self.whole_plan = None if shared else self.dense.plan(forward_batch)
        self.chunks, self.shared, self.dense_rows, self.dense_batch = [], None, None, None
        if forward_batch.forward_mode not in (ForwardMode.EXTEND, ForwardMode.MIXED):
            return
        rest, rest_rows, start = [], [], 0
        reasons: list[tuple[str, int, str]] = []
        for request, (length, keys) in enumerate(host_lengths(forward_batch)):
            end = start + length
            rid = forward_batch.rids[request] if forward_batch.rids else str(request)
            found, layout = self._layout_or_reason(forward_batch, request, length, keys), None
            if isinstance(found, TokenLayout):
                self._warn_of_vision_cache(found, length)
                layout = found
            else:
                self._say_once(*found)
                if length > 1:  # a decode step of a mixed batch is no prefill
                    reasons.append((found[0], length, rid))
                if shared:  # a dense backend would need all rows on this rank
                    layout = TokenLayout(items=(), length=keys, device=self.device)
            if layout is None:
                rest.append(request)
                rest_rows.append(torch.arange(start, end))
            else:
                slots = self._slots(forward_batch, request, keys)
                self.chunks.append(
                    SparseChunk(
                        request=request, rid=rid, start=start, end=end, layout=layout, slots=slots,
                        dense=layout is not found,
                    )
                )  # fmt: skip
            start = end
        self.watch.begin(reasons, [chunk.end - chunk.start for chunk in self.chunks if not chunk.dense])
        if self.ranks is not None and meta is not None:
            self.shared = SharedBatch.of(
                self.ranks, meta.sharding, meta.width, self.chunks, forward_batch.out_cache_loc, self.config.text_tail
            )
        elif self.chunks and rest:
            self.dense_rows = upload(torch.cat(rest_rows), self.device)
            self.dense_batch = part_of_batch(forward_batch, rest, self.dense_rows)
            self.dense_plan = self.dense.plan(self.dense_batch)

    def _slots(self, batch: ForwardBatch, request: int, keys: int) -> torch.Tensor:
        """A request's row of the page table, copied once for all layers; indexing by a tensor would wait for it."""
        row = batch.req_pool_indices[request : request + 1]
        table: torch.Tensor = self.req_to_token_pool.req_to_token[:, :keys]
        return table.index_select(0, row)[0].int()

    def _warn_of_vision_cache(self, layout: TokenLayout, chunk: int) -> None:
        if "vision cache" not in self._said:
            warning = encoded_again(layout, chunk, *self.model_configs, envs.SGLANG_VLM_CACHE_SIZE_MB.get())
            if warning is not None:
                self._said.add("vision cache")
                log.warning("mm_sparse: said once: %s", warning)

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
        if inputs is None and self.config.assume_video is not None:
            layout = assumed_video(self.config.assume_video, keys, self.device)
        else:
            try:
                layout = layout_from_sglang(inputs, keys, self.merge, self.device)
            except ValueError as error:  # one odd request must not stop the server
                return ("no token layout: ", str(error))
        if is_question(layout, length, self.config.text_tail):
            # Every key for every query, and the dense backend splits long keys over all processors, in the pool's order
            return ("nothing but a question, as after a radix hit",)
        return layout

    def forward_extend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch,
        save_kv_cache: bool = True, **kwargs: Any,
    ) -> torch.Tensor:  # fmt: skip
        """[tokens, heads * head_dim] of the whole batch; writes K and V into the pool first."""
        recipes = self.watch.recipes.now[layer.layer_id]
        if self.shared is not None:
            return self._shared_extend(self.shared, q, k, v, layer, recipes)
        if recipes is None or not self.chunks:
            return self.dense.extend(self.whole_plan, q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if given := [name for name, value in kwargs.items() if value is not None]:
            raise ValueError(f"mm_sparse: attention with {given[0]}: the sparse kernels don't compute that")
        if save_kv_cache:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        key_pool, value_pool = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if self.dense_rows is not None:
            rows = self.dense_rows
            out[rows] = self.dense.extend(
                self.dense_plan, q[rows], None, None, layer, self.dense_batch, save_kv_cache=False
            )
        heads, pools = (layer.tp_q_head_num, layer.head_dim), (key_pool, value_pool)
        for chunk in self.chunks:
            chunk_q, chunk_out = (x[chunk.start : chunk.end].view(-1, *heads) for x in (q, out))
            self._attend(chunk, layer, recipes, chunk_q, pools, chunk_out)
        return out

    def _shared_extend(
        self, batch: SharedBatch, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention,
        recipes: Recipes | None,
    ) -> torch.Tensor:  # fmt: skip
        """This rank's rows [W, heads * head_dim] of a context-parallel batch; dense chunks and layers are ours too."""
        pools = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        q, k, v = (x.view(len(x), -1, layer.head_dim) for x in (q, k, v))
        dense: Recipes = (Dense(),) * layer.tp_q_head_num
        wanted = [dense if recipes is None or chunk.dense else recipes for chunk in batch.chunks]
        finish_queries = batch.start_queries(q, wanted)
        finish_keys = batch.start(k, pools[0])
        queries = finish_queries()
        finish_values = batch.start(v, pools[1])  # on their way while the first group is estimated and planned
        finish_keys()
        out = torch.empty_like(queries)
        for number, (chunk, patterns) in enumerate(zip(batch.chunks, wanted, strict=True)):
            if any(isinstance(pattern, Auto) for pattern in patterns):
                finish_values()
            rows = slice(chunk.start, chunk.end)
            share = ChunkShare(batch=batch, chunk=number, start=chunk.start, out=out, values=finish_values)
            self._attend(chunk, layer, patterns, queries[rows], pools, out[rows], share, quiet=patterns is dense)
        return batch.local(out).flatten(1)

    def _attend(
        self, chunk: SparseChunk, layer: RadixAttention, recipes: Sequence[HeadPattern], q: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, share: Share | None = None, quiet: bool = False,
    ) -> None:  # fmt: skip
        """One chunk of one request, q and out [Nq, H, D]; quiet: dense, and not what metrics and traces are about."""
        recipes = self.auto.recipes(
            chunk.rid, layer.layer_id, recipes, q, *pools, slots=chunk.slots, layout=chunk.layout,
            scale=layer.scaling, out=out,
        )  # fmt: skip
        with nullcontext() if quiet else self.watch.timer(layer.layer_id) or nullcontext():
            attended, lse, plan = sparse_prefill(
                q, *pools, slots=chunk.slots, layout=chunk.layout, patterns=recipes, scale=layer.scaling,
                engine=self.engine, out=out, share=share, tail=self.config.text_tail,
            )  # fmt: skip
        if quiet:
            return
        self.watch.after(
            Done(layer=layer.layer_id, q=q, lse=lse, pool=pools[0], slots=chunk.slots, layout=chunk.layout,
                 plan=plan, scale=layer.scaling)
        )  # fmt: skip
        if self.tracer:
            tensors = (q, *(pool[chunk.slots] for pool in pools), attended)
            self.tracer.record(chunk.rid, layer.layer_id, chunk.layout, plan, tensors)

    def forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.dense.backend.forward_decode(*args, **kwargs)  # type: ignore[no-any-return]

    # Decode and its CUDA graphs are the dense backend's alone.
    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        self.dense.backend.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        self.dense.backend.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.dense.backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> Any:
        return self.dense.backend.get_cuda_graph_seq_len_fill_value()

    def on_after_cuda_graph_warmup(self) -> None:
        self.dense.backend.on_after_cuda_graph_warmup()

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Sparse prefill reads the page table until it ends."""
        return self.dense.backend.shared_read_ends(fm) if fm.is_decode_or_idle() else SharedReadEnds.UNKNOWN
