"""Attention of a batch spread over N ranks has the same bits as on one, for every recipe. Ranks are threads here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import pytest
import torch
from recipes import ITEMS, RECIPES

from mm_sglang.batches import SparseChunk
from mm_sglang.context_parallel.attention import ChunkShare, SharedBatch
from mm_sglang.context_parallel.collectives import Ranks
from mm_sglang.context_parallel.queries import pieces, wanted
from mm_sglang.kernels import classes
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import tiles_by_head
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern, head_pattern
from mm_sglang.kernels.plan import Plan
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.parallel.sharding import KINDS, Sharding
from mm_sglang.watch import Done, recall_by_head

REFERENCE = engine("reference")
HEAD_DIM, SCALE, KV_HEADS, TAIL = 16, 0.7, 2, 150


Tiles = list[tuple[list[int], int]]  # of each chunk: tiles by head, causal tiles


@dataclass(kw_only=True)
class Table:
    """What the threads hand each other."""

    size: int
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    rows_moved: int = 0
    plans: list[Tiles] = field(default_factory=list)  # of each rank
    recalls: list[torch.Tensor] = field(default_factory=list)  # of each rank and chunk, if asked for

    def __post_init__(self) -> None:
        self.barrier = Barrier(self.size, timeout=60)


@dataclass(frozen=True, kw_only=True, eq=False)
class Thread(Ranks):
    table: Table

    def gather(self, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        self.table.parts[self.rank] = part
        self.table.barrier.wait()
        parts = [self.table.parts[rank] for rank in range(self.size)]
        assert len({p.shape for p in parts}) == 1
        self.table.barrier.wait()
        if self.rank == 0:
            self.table.rows_moved += len(part)
        return lambda: torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    chunk: SparseChunk
    patterns: list[HeadPattern]


def prompts(shapes: list[tuple[int, int]], patterns: list[HeadPattern]) -> tuple[list[Prompt], torch.Tensor]:
    """One of each (prefix, queries), with rows of the pool from 1 on in no order; and the batch's new rows."""
    generator = torch.Generator().manual_seed(sum(p + n for p, n in shapes))
    total = sum(p + n for p, n in shapes)
    free, made, new, start = torch.randperm(total, generator=generator) + 1, [], [], 0
    for number, (prefix, queries) in enumerate(shapes):
        keys = prefix + queries
        slots, free = free[:keys].int(), free[keys:]
        q = torch.randn(queries, len(patterns), HEAD_DIM, generator=generator)
        k, v = torch.randn(2, keys, KV_HEADS, HEAD_DIM, generator=generator)
        chunk = SparseChunk(
            request=number, rid=str(number), start=start, end=start + queries,
            layout=TokenLayout(items=ITEMS, length=keys), slots=slots,
        )  # fmt: skip
        made.append(Prompt(q=q, k=k, v=v, chunk=chunk, patterns=patterns))
        new.append(slots[prefix:])
        start += queries
    return made, torch.cat(new)


def done(p: Prompt, q: torch.Tensor, lse: torch.Tensor, pool: torch.Tensor, slots: torch.Tensor, plan: Plan) -> Done:
    return Done(layer=0, q=q, lse=lse, pool=pool, slots=slots, layout=p.chunk.layout, plan=plan, scale=SCALE)


def alone(batch: list[Prompt]) -> tuple[torch.Tensor, Tiles]:
    results = [
        sparse_prefill(
            p.q, p.k, p.v, layout=p.chunk.layout, patterns=p.patterns, scale=SCALE, engine=REFERENCE, tail=TAIL
        )
        for p in batch
    ]
    return torch.cat([out for out, _, _ in results]), [tiles(plan) for _, _, plan in results]


def tiles(plan: Plan) -> tuple[list[int], int]:
    return tiles_by_head(plan), plan.causal_tiles


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated and not written holds NaN, as queries of other ranks' rows do that nobody may read."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().item()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def together(
    batch: list[Prompt], new: torch.Tensor, size: int, kind: str, tail: int = TAIL, rows_recalled: int = 0
) -> tuple[torch.Tensor, Table]:
    """The rows of all ranks put together; each rank has a pool of its own, with the prefixes only."""
    sharding = Sharding(lengths=tuple(len(p.q) for p in batch), size=size, kind=kind)
    width, table = -(-max(sharding.counts) // size) * size, Table(size=size)
    pool = torch.full((int(max(p.chunk.slots.max() for p in batch)) + 1, KV_HEADS, HEAD_DIM), torch.nan)
    q = torch.cat([p.q for p in batch])

    def run(rank: int) -> tuple[torch.Tensor, Tiles]:
        ranks = Thread(rank=rank, size=size, group=None, cpu_group=None, table=table)
        keys, values = pool.clone(), pool.clone()
        for p in batch:
            old = p.chunk.slots[: len(p.k) - len(p.q)].long()
            keys[old], values[old] = p.k[: len(old)], p.v[: len(old)]
        own = sharding.rows(rank)
        fill = (0, 0, 0, 0, 0, width - len(own))
        k, v = (torch.cat([x[-len(p.q) :] for p, x in zip(batch, xs, strict=True)])[own] for xs in (
            [p.k for p in batch], [p.v for p in batch]))  # fmt: skip
        shared = SharedBatch.of(ranks, sharding, width, [p.chunk for p in batch], new, tail)
        local_q, k, v = (torch.nn.functional.pad(x, fill) for x in (q[own], k, v))
        finish_queries = shared.start_queries(local_q, [p.patterns for p in batch])
        finish_keys = shared.start(k, keys)
        queries = finish_queries()
        finish_values = shared.start(v, values)
        finish_keys()
        out = torch.full_like(queries, torch.nan)
        planned = []
        for number, p in enumerate(batch):
            rows = slice(p.chunk.start, p.chunk.end)
            share = ChunkShare(batch=shared, chunk=number, start=p.chunk.start, out=out, values=finish_values)
            _, lse, plan = sparse_prefill(
                queries[rows], keys, values, slots=p.chunk.slots, layout=p.chunk.layout, patterns=p.patterns,
                scale=SCALE, engine=REFERENCE, out=out[rows], share=share, tail=tail,
            )  # fmt: skip
            planned.append(tiles(plan))
            if rows_recalled:
                made = done(p, queries[rows], lse, keys, p.chunk.slots, plan)
                table.recalls.append(recall_by_head(made, rows_recalled, REFERENCE, ranks))
        return shared.local(out)[: len(own)], planned

    def run_or_free_the_others(rank: int) -> tuple[torch.Tensor, Tiles]:
        try:
            return run(rank)
        except BaseException:
            table.barrier.abort()
            raise

    with poisoned_memory(), ThreadPoolExecutor(size) as pool_of_threads:
        parts = list(pool_of_threads.map(run_or_free_the_others, range(size)))
    whole = torch.empty_like(q)
    for rank, (part, planned) in enumerate(parts):
        whole[sharding.rows(rank)] = part
        table.plans.append(planned)
    return whole, table


def recipes(name: str) -> list[HeadPattern]:
    return [head_pattern(RECIPES[name])] * 6


@pytest.mark.parametrize("size, kind", [(2, "stripe"), (4, "stripe"), (8, "stripe"), (4, "zigzag")])
@pytest.mark.parametrize("name", RECIPES)
def test_bits_do_not_depend_on_the_number_of_ranks(name: str, size: int, kind: str) -> None:
    """Several prompts in a batch: a whole one, a chunk inside a video, a few tokens after a radix hit."""
    batch, new = prompts([(0, 611), (200, 411), (300, 7)], recipes(name))
    got, table = together(batch, new, size, kind)
    want, plans = alone(batch)
    assert torch.equal(got, want)
    assert table.plans == [plans] * size  # so metrics and traces are those of one rank too


@pytest.mark.parametrize("size, kind", [(2, "stripe"), (4, "zigzag")])
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "dense"])
def test_recall_is_that_of_one_rank(name: str, size: int, kind: str) -> None:
    """Some rows belong to a group whose tiles go round the ranks, some to the text's tail, some to their owners."""
    residual = {"residual": name in ("block_topk", "q_grid")}
    patterns = [*[head_pattern(RECIPES[name] | residual)] * 4, head_pattern(RECIPES["dense"]), recipes("a_shape")[0]]
    batch, new = prompts([(200, 411)], patterns)
    (p,) = batch
    _, lse, plan = sparse_prefill(
        p.q, p.k, p.v, layout=p.chunk.layout, patterns=p.patterns, scale=SCALE, engine=REFERENCE, tail=TAIL
    )
    want = recall_by_head(done(p, p.q, lse, p.k, torch.arange(len(p.k), dtype=torch.int32), plan), 37, REFERENCE)
    _, table = together(batch, new, size, kind, rows_recalled=37)
    assert 0 < float(want.min()) < 0.97 and float(want[4]) == pytest.approx(1.0)
    assert len(table.recalls) == size
    for got in table.recalls:
        assert torch.equal(got, table.recalls[0])  # or ranks would disagree about what the guard does
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_heads_and_a_residual(kind: str) -> None:
    names = ["vertical_slash", "grid_frame", "2d_mixed", "block_topk", "dense", "q_grid", "vertical_slash", "a_shape"]
    mixed: list[dict[str, Any]] = [RECIPES[name] | {"residual": name in ("block_topk", "q_grid")} for name in names]
    batch, new = prompts([(100, 500)], [head_pattern(recipe) for recipe in mixed])
    got, _ = together(batch, new, 3, kind)
    assert torch.equal(got, alone(batch)[0])


def test_only_the_sampled_queries_travel_where_nothing_is_gathered() -> None:
    """1000 rows on 2 ranks: K and V in full; of the queries 17 for vertical_slash, all for a grid with whole rows."""
    rows = {}
    for name in ("block_topk", "vertical_slash", "grid_frame"):
        batch, new = prompts([(0, 1000)], recipes(name))
        rows[name] = together(batch, new, 2, "stripe", tail=0)[1].rows_moved
    width = 512
    assert rows["block_topk"] == 2 * width + 4  # and the means of its four blocks
    # the sampled are all in the last block, so one rank has them all; and parts of their masses: of 4 pieces of keys
    # 2 + 2, and the diagonals
    assert rows["vertical_slash"] == 2 * width + 17 + 2 + 2 + 1
    assert rows["grid_frame"] > 3 * width


def test_of_the_queries_only_heads_that_are_looked_at_travel() -> None:
    """Heads whose rows are gathered in full, apart from those with a few sampled rows, apart from those with none."""
    names = ["grid_frame", "grid_frame", "block_topk", "vertical_slash", "vertical_slash", "grid_frame"]
    patterns = [head_pattern(RECIPES[name]) for name in names]
    batch, new = prompts([(0, 1000), (300, 7)], patterns)
    chunks = [p.chunk for p in batch]
    few, (heads, whole) = pieces([patterns] * 2, chunks, (1000, 7), 0)
    assert few == ((2, 3, 4), (((None, 17),), ((None, 17),)))
    assert heads == (0, 1, 5) and {("text", None), ("vision", None)} < set(whole[0])
    assert wanted(few[1], chunks, (1000, 7)).nonzero()[:, 0].tolist() == list(range(983, 1007))
    assert wanted(whole, chunks, (1000, 7)).all()
    assert pieces([[head_pattern(RECIPES["block_topk"])] * 6] * 2, chunks, (1000, 7), 0) == []
    assert torch.equal(together(batch, new, 2, "stripe")[0], alone(batch)[0])


@pytest.mark.parametrize("name", ["q_slash", "2d_slash", "2d_column_blocks"])
def test_of_a_boundary_the_rarer_class_travels_and_the_last_rows_of_the_other(name: str) -> None:
    """Of a head that tells text from vision, which used to send every row; one without any boundary beside it."""
    patterns = [head_pattern(RECIPES[name]), head_pattern(RECIPES["vertical_slash"])] * 2
    batch, new = prompts([(200, 1000)], patterns)
    (chunk,) = (p.chunk for p in batch)
    vision = classes.mask(chunk.layout, "vision")[200:]
    rare = vision if vision.sum() < 500 else ~vision
    assert 0 < rare.sum() < 450
    few, (heads, needed) = pieces([patterns], [chunk], (1000,), 0)
    assert (few[0], heads) == ((1, 3), (0, 2))
    rows = wanted(needed, [chunk], (1000,))
    assert rows[rare].all() and rows[~rare].sum() == RECIPES[name]["last_q"]
    assert rows[~rare].nonzero()[-1, 0] == (~rare).sum() - 1
    assert torch.equal(together(batch, new, 2, "stripe")[0], alone(batch)[0])
