"""What SGLang's runner does with our strategy, and which launches are refused."""

from __future__ import annotations

import os
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # SGLang imports Triton, which asks once; other tests need it so

from sglang.srt.layers.cp import base
from sglang.srt.layers.cp.utils import cp_shard_model_inputs, is_cp_active, prepare_cp_forward
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel

from mm_sglang.compat import cp_inputs, cp_strategy
from mm_sglang.config import SparseConfig, Trace
from mm_sglang.context_parallel import start
from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.context_parallel.strategy import BlockStrategy
from mm_sglang.kernels.patterns import Dense

CPU = torch.device("cpu")


def ranks(rank: int, size: int) -> Ranks:
    return Ranks(rank=rank, size=size, group=None, cpu_group=None)


def batch(*lengths: int) -> Any:
    """As much of a ForwardBatch as the runner's context-parallel steps read."""
    total = sum(lengths)
    return SimpleNamespace(
        forward_mode=ForwardMode.EXTEND, input_ids=torch.arange(total), extend_seq_lens_cpu=list(lengths),
        seq_lens_cpu=torch.tensor(lengths), attn_cp_metadata=None, out_cache_loc=torch.arange(total + 5),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["interleave", "zigzag"])
def test_the_runner_shards_and_gathers_whole_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, lengths = 4, (700, 3, 130)
    total, parts, seen = sum(lengths), [], []
    monkeypatch.setattr(base, "_STRATEGY", None)
    with get_parallel().override(attn_cp_size=size, enable_cp_tp_group_sharing=False):
        for rank in range(size):
            fb = batch(*lengths)
            strategy = BlockStrategy(ranks(rank, size), name, CPU)
            cp_strategy.install(strategy)
            assert base.get_cp_strategy() is strategy and is_cp_active(fb)
            prepare_cp_forward(fb)
            positions = torch.arange(3 * total).view(3, total)  # mrope's
            x = torch.arange(2 * total, dtype=torch.float32).view(total, 2)
            with cp_shard_model_inputs(x, positions, fb, fb.input_ids) as (own, own_positions, own_ids):
                assert len(own) == own_positions.shape[1] == len(own_ids) == fb.attn_cp_metadata.width
                rows = fb.attn_cp_metadata.rows
                assert torch.equal(own_positions[:, : len(rows)], positions[:, rows])
                assert torch.equal(own_ids[: len(rows)], rows) and (own[len(rows) :] == 0).all()
            parts.append(own)
            seen.append(rows)
        assert sorted(torch.cat(seen).tolist()) == list(range(total))
        monkeypatch.setattr(Ranks, "gather", lambda self, part: lambda: torch.cat(parts))
        assert torch.equal(strategy.gather_hidden_states(own, fb), x)


def test_batches_without_a_block_a_rank_run_replicated() -> None:
    strategy = BlockStrategy(ranks(0, 4), "interleave", CPU)
    assert not strategy.can_apply(384, batch(384)) and strategy.can_apply(385, batch(385))
    assert strategy.can_apply(8, batch(2, 2, 2, 2))  # requests are blocks too
    decode = batch(1, 1, 1, 1)
    decode.forward_mode = ForwardMode.DECODE
    assert not strategy.can_apply(4, decode)
    with pytest.raises(RuntimeError, match="needs --attention-backend mm_sparse"):
        strategy.materialize_full_kv()


@pytest.mark.parametrize("name", ["interleave", "zigzag"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_no_rank_has_more_rows_than_the_batch(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's attention layer cuts a rank's rows, filled up, to the batch's: of 81 and 1, two of 84 would be lost."""
    strategy = BlockStrategy(ranks(0, size), name, CPU)
    assert size > 2 or not strategy.can_apply(82, batch(81, 1))
    monkeypatch.setattr(base, "_STRATEGY", None)
    cp_strategy.install(strategy)
    draw, spread = Random(size), 0
    with get_parallel().override(attn_cp_size=size, enable_cp_tp_group_sharing=False):
        for _ in range(300):
            lengths = [draw.choice((1, 2, draw.randint(1, 300))) for _ in range(draw.randint(1, 6 * size))]
            fb = batch(*lengths)
            if strategy.can_apply(sum(lengths), fb):
                prepare_cp_forward(fb)
                assert fb.attn_cp_metadata.width <= sum(lengths), lengths
                spread += 1
    assert spread > 100


def parallel(**values: Any) -> Any:
    fit = dict(attn_cp_size=2, tp_size=2, pp_size=1, enable_prefill_cp=True, cp_strategy="interleave")
    return lambda: SimpleNamespace(**fit | values)


@pytest.mark.parametrize(
    "values, settings, mixed, encoder, message",
    [
        ({"enable_prefill_cp": False}, {}, False, False, "--attn-cp-size 2 with no --enable-prefill-cp: needs it"),
        ({"tp_size": 4}, {}, False, False, "--attn-cp-size 2 with --tp-size 4: needs --tp-size 2"),
        ({"pp_size": 2}, {}, False, False, "with --pp-size 2: needs 1"),
        ({}, {}, True, False, "with --enable-mixed-chunk: needs none"),
        ({}, {"trace": Trace(dir="unused", tensors=(0,))}, False, False, "with trace: tensors: needs none"),
        ({}, {}, False, True, "with no --mm-enable-dp-encoder: needs it"),
    ],
)
def test_launches_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], settings: dict[str, Any], mixed: bool, encoder: bool,
    message: str,
) -> None:  # fmt: skip
    """encoder: without SGLang's flag for the vision tower."""
    monkeypatch.setattr(start, "get_parallel", parallel(**values))
    monkeypatch.setattr(start, "get_schedule", lambda: SimpleNamespace(enable_mixed_chunk=mixed))
    monkeypatch.setattr(start, "get_mm", lambda: SimpleNamespace(mm_enable_dp_encoder=not encoder))
    with pytest.raises(ValueError, match=message):
        start.start_ranks(SimpleNamespace(), SparseConfig(default=Dense(), **settings))


def test_without_context_parallelism_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "get_parallel", parallel(attn_cp_size=1))
    assert start.start_ranks(SimpleNamespace(), SparseConfig(default=Dense())) is None


def test_a_model_whose_forward_was_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="context parallelism for SimpleNamespace: needs one of"):
        cp_inputs.install(SimpleNamespace())
