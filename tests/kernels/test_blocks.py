"""Block scores and the choice of best blocks: references against plain loops, Triton twins against both."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the modules below are imported

import triton
import triton.language as tl

from mm_sglang.kernels.estimate import blocks_gpu as estimate_gpu
from mm_sglang.kernels.estimate import blocks_reference as estimate
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import reference_ops
from mm_sglang.kernels.patterns import BlockTopK, Dense
from mm_sglang.kernels.permute.reference import key_order
from mm_sglang.kernels.plan import EMPTY, PAD, PARTS, TILE, Blocks, HeadGroup, Segment, TileLists
from mm_sglang.kernels.prefill import make_plan
from mm_sglang.kernels.select import blocks_gpu
from mm_sglang.kernels.select.blocks_reference import best_blocks, scores
from mm_sglang.kernels.tiles import reference as tiles

CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, Triton's interpreter is off")
DEVICES = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=CPU), pytest.param("cuda", marks=pytest.mark.gpu)]
)
# bf16 is not computed right in Triton's interpreter
DTYPES = pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", torch.float32, marks=CPU),
        pytest.param("cpu", torch.float16, marks=CPU),
        pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
GQA = {
    "1:1": ((0,), (1,), (2,)),
    "7:1": ((0, 1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12, 13)),
    "fillers": ((1, 2), (5, -1), (-1, -1)),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orders(rows: int, base: int, count: int, tiles: int) -> torch.Tensor:
    """int32 [rows, tiles * TILE]: shuffled positions of [base, base + count) among PADs, one tile without any."""
    out = torch.full((rows, tiles * TILE), PAD, dtype=torch.int32)
    for r in range(rows):
        place = torch.randperm((tiles - 1) * TILE, generator=generator(r))[:count]
        place = torch.where(place >= TILE, place + TILE, place)  # tile 1 stays empty
        out[r, place] = torch.randperm(count, generator=generator(r + 9)).int() + base
    return out


def pooled(
    x: torch.Tensor, order: list[list[int]], slots: list[int] | None, heads: Any, parts: int, reverse: bool, base: int
) -> torch.Tensor:
    """What `pool` promises, row by row, fp64."""
    out = torch.zeros(sum(map(len, heads)), len(order[0]) // TILE, parts, x.shape[2], dtype=torch.float64)
    member, long = 0, TILE // parts
    for r, row in enumerate(heads):
        for head in row:
            for m in range(len(order[r]) // TILE):
                tile = order[r][m * TILE : (m + 1) * TILE]
                for part in range(parts):
                    run = [p for p in tile[part * long : (part + 1) * long] if p != PAD]
                    at = run or [p for p in tile if p != PAD]
                    if head >= 0 and at:
                        rows = [p - base if slots is None else slots[p] for p in at]
                        place = parts - 1 - part if reverse else part
                        out[member, m, place] = x[rows, head].double().mean(0)
            member += 1
    return out.flatten(2)


@pytest.mark.parametrize("parts, reverse", [(1, False), (4, False), (16, True), (TILE, False), (TILE, True)])
@pytest.mark.parametrize("heads", GQA.values(), ids=GQA)
@pytest.mark.parametrize("gathered", [False, True])
@DTYPES
def test_pool(
    device: str, dtype: torch.dtype, gathered: bool, heads: tuple[tuple[int, ...], ...], parts: int, reverse: bool
) -> None:
    """Queries [base, base + count) of a chunk, strided in memory; in order, or gathered with gaps."""
    base, count = 300, 261
    x = torch.randn(16, count, 48, generator=generator(1)).to(dtype)[..., 16:32].transpose(0, 1)
    order = orders(len(heads), base, count, 5) if gathered else None
    rows = list(range(base, base + count)) + [PAD] * (3 * TILE - count)
    positions = [rows] * len(heads) if order is None else order.tolist()
    want = pooled(x, positions, None, heads, parts, reverse, base)
    arguments = (None, heads, parts, reverse, base, count)
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 1e-3)
    for module, where in ((estimate, "cpu"), (estimate_gpu, device)):
        got = module.pool(x.to(where), order if order is None else order.to(where), *arguments)
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu().double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("gathered", [False, True])
@DEVICES
def test_pool_reads_a_paged_pool(device: str, gathered: bool) -> None:
    """Keys [0, count) in rows of a pool whose other rows are NaN."""
    count, heads = 300, ((1,), (0,))
    slots = torch.randperm(1000, generator=generator(2))[:count].int()
    x = torch.full((1000, 2, 32), float("nan"))
    x[slots.long()] = torch.randn(count, 2, 32, generator=generator(3))
    order = orders(2, 0, count, 4) if gathered else None
    positions = [[*range(count), *[PAD] * (3 * TILE - count)]] * 2 if order is None else order.tolist()
    want = pooled(x, positions, slots.tolist(), heads, 16, True, 0)
    for module, where in ((estimate, "cpu"), (estimate_gpu, device)):
        moved = None if order is None else order.to(where)
        got = module.pool(x.to(where), moved, slots.to(where), heads, 16, True, 0, count)
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-6)


def grouped(x: torch.Tensor, order: list[list[int]], slots: list[int] | None, heads: Any) -> tuple[Any, Any, float]:
    """What `clusters` promises, row by row, fp64; and the least share by which any of its decisions was made."""
    means = torch.zeros(len(heads), len(order[0]) // TILE, PARTS, x.shape[2], dtype=torch.float64)
    numbers, margin = torch.full(means.shape[:3], EMPTY, dtype=torch.float64), math.inf
    for r, head in enumerate(heads):
        for m in range(len(order[r]) // TILE):
            at = [p if slots is None else slots[p] for p in order[r][m * TILE : (m + 1) * TILE] if p != PAD]
            if not at:
                continue
            rows = x[at, head].double()
            apart = [(rows - rows.mean(0)).square().sum(1)]
            for _ in range(PARTS - 1):
                nearest = torch.stack(apart).amin(0)
                far = nearest.argmax()
                others = nearest[nearest != nearest[far]]  # equal ones are exactly so, and the first is meant
                if len(others):
                    margin = min(margin, float(1 - others.max() / nearest[far]))
                apart.append((rows - rows[far]).square().sum(1))
            distance = torch.stack(apart)
            first, second = distance.topk(2, 0, largest=False).values
            margin = min(margin, float(torch.where(second > first, 1 - first / second, 1.0).min()))
            for part in range(PARTS):
                own = rows[distance.argmin(0) == part]
                if len(own):
                    means[r, m, part], numbers[r, m, part] = own.mean(0), math.log(len(own))
    return means.flatten(2), numbers, margin


@pytest.mark.parametrize("count", [261, 384, 1])
@pytest.mark.parametrize("gathered", [False, True])
@DTYPES
def test_clusters(device: str, dtype: torch.dtype, gathered: bool, count: int) -> None:
    """Keys [0, count) in rows of a paged pool whose others are NaN; some stand out, some are equal."""
    heads = (2, 0)
    slots = torch.randperm(1000, generator=generator(2))[:count].int()
    own = torch.randn(count, 3, 16, generator=generator(20 + count))
    own[torch.randperm(count, generator=generator(3))[: count // 40]] *= 6.0
    own[: count // 3] = (own[0] * 8).round() / 8  # the mean of as many is exact
    x = torch.full((1000, 3, 16), float("nan"), dtype=dtype)
    x[slots.long()] = own.to(dtype)
    order = orders(2, 0, count, 4 if count < 300 else 5) if gathered else None
    positions = [[*range(count), *[PAD] * (-count % TILE)]] * 2 if order is None else order.tolist()
    want, numbers, margin = grouped(x, positions, slots.tolist(), heads)
    assert margin > 1e-5  # no rounding of fp32 can move a row
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (2**-7, 1e-3)
    for module, where in ((estimate, "cpu"), (estimate_gpu, device)):
        moved = None if order is None else order.to(where)
        means, logs = module.clusters(x.to(where), moved, slots.to(where), heads, count)
        assert means.dtype == dtype and logs.dtype == torch.float32
        torch.testing.assert_close(means.cpu().double(), want, rtol=rtol, atol=atol)
        torch.testing.assert_close(logs.cpu().double(), numbers, rtol=1e-6, atol=1e-6)


@DEVICES
def test_what_stands_alone_in_a_tile_has_a_cluster_of_its_own(device: str) -> None:
    k = torch.randn(TILE, 1, 32, generator=generator(21)) * 0.1
    k[70] += 3.0
    for module, where in ((estimate, "cpu"), (estimate_gpu, device)):
        means, logs = module.clusters(k.to(where), None, None, (0,), TILE)
        alone = (logs.cpu() == 0.0)[0, 0].nonzero()[:, 0].tolist()
        assert any(torch.equal(means.cpu().view(PARTS, 32)[n], k[70, 0]) for n in alone)
        assert logs.cpu().exp().sum() == pytest.approx(TILE)


def test_an_antidiagonal_score_is_xattentions() -> None:
    """Logits of every 16 queries and keys, their antidiagonal's mean; a softmax for queries, summed up by tile."""
    q, k = torch.randn(3 * TILE, 1, 32, generator=generator(4)), torch.randn(3 * TILE, 1, 32, generator=generator(5))
    plan = make_plan(
        q, k, layout=TokenLayout(items=(), length=3 * TILE), patterns=[BlockTopK(score="antidiagonal", sink=0)],
        scale=0.5, ops=reference_ops(),
    )  # fmt: skip
    blocks = plan.groups[0].segments[0].blocks
    assert blocks is not None
    i = torch.arange(16)
    products = (q[:, 0] @ k[:, 0].T * 0.5).view(3, 8, 16, 3, 8, 16)[:, :, i, :, :, 15 - i].mean(0)  # [3, 8, 3, 8]
    want = products.flatten(2).softmax(2).view(3, 8, 3, 8).sum((1, 3)).log()
    visible = torch.ones(1, 3, 3, dtype=torch.bool)
    torch.testing.assert_close(scores(blocks, 0, 3, visible)[0], want, rtol=1e-4, atol=1e-5)


def choice(
    score: list[float], keep: int, coverage: float | None, sink: int, local: int, lowest: float
) -> tuple[set[int], float]:
    """Tiles kept of visible ones with these scores, and by how much mass no decision was closer."""
    seen = len(score)
    taken = {n for n in range(seen) if n < sink or n >= seen - local}
    weight = [math.exp(x - max(score)) for x in score]
    margin = 1.0
    for n in sorted(set(range(seen)) - taken, key=lambda n: (-score[n], n)):
        share = sum(weight[t] for t in taken) / sum(weight)
        if len(taken) >= keep:
            break
        own = weight[n] / sum(weight)
        margin = min(margin, abs(own - lowest) if lowest else 1.0)
        if own < lowest:
            break
        if coverage is not None:
            margin = min(margin, abs(share - coverage))
            if share >= coverage:
                break
        taken.add(n)
    return taken, margin


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Small whole numbers: products and sums of them are exact in any dtype here, and often equal."""
    return torch.randint(-3, 4, shape, generator=generator(seed)).float()


def blocks_of(group_heads: int, rows: int, q_tiles: int, k_tiles: int, **budget: Any) -> Blocks:
    size = 32 * budget.get("parts", 1)
    k = integers(rows, k_tiles, size, seed=6)
    if k_tiles > 4:
        k[:, 3] = k[:, 1]  # equal scores for sure
    default: dict[str, Any] = dict(scale=0.125, keep=4, coverage=None, sink=1, local=1)
    if "parts" in budget:
        number = torch.randint(0, 9, (rows, k_tiles, budget["parts"]), generator=generator(12))
        number[:, 5:6] = 0
        default["weight"] = torch.where(number > 0, number.clamp(min=1).log(), EMPTY)
        if k_tiles > 4:
            default["weight"][:, 3] = default["weight"][:, 1]
    return Blocks(**default | budget, q=integers(group_heads, q_tiles, size, seed=5), k=k)


def choices(blocks: Blocks, reached: list[list[int]], g: int, first: int) -> tuple[list[list[set[int]]], float]:
    """Kept tiles [G][M] of the segment and the least margin, from scores in fp64."""
    out, least = [], 1.0
    for member in range(len(blocks.q)):
        r = member // g
        rows = []
        for m, seen in enumerate(reached[r]):
            size = blocks.k.shape[2] // blocks.parts
            k = blocks.k[r, :seen].double().view(seen, 1, blocks.parts, size)
            q = blocks.q[member, first + m].double().view(blocks.parts, 1, size)
            weight = 0.0 if blocks.weight is None else blocks.weight[r, :seen].double()[:, None]
            score = ((q * k).sum(3) * blocks.scale + weight).logsumexp(2)  # [seen, parts of queries]
            score = score.softmax(0).sum(1).log() if blocks.parts > 1 else score[:, 0]
            taken, margin = choice(
                score.tolist(), blocks.keep, blocks.coverage, blocks.sink, blocks.local, blocks.least
            )
            rows.append(taken)
            least = min(least, margin)
        out.append(rows)
    return out, least


BUDGETS: dict[str, dict[str, Any]] = {
    "count": dict(keep=4),
    "ties": dict(keep=5, scale=0.0),
    "one": dict(keep=1, sink=0, local=0),
    "none": dict(keep=0, sink=0, local=0),
    "fewer than forced": dict(keep=2, sink=2, local=3),
    "all": dict(keep=10**6),
    "coverage": dict(keep=10**6, coverage=0.83, sink=0),
    "coverage of equals": dict(keep=10**6, coverage=0.37, scale=0.0, sink=0, local=0),
    "coverage by the forced": dict(keep=10**6, coverage=0.001, scale=0.0625),
    "coverage and count": dict(keep=3, coverage=0.95, local=0),
    "clusters": dict(keep=4, parts=4),
    "least": dict(keep=10**6, least=0.0231),
    "least of none": dict(keep=10**6, least=0.9, sink=0, local=0),
    "least, coverage and count": dict(keep=7, least=0.0431, coverage=0.83),
    "clusters, least": dict(keep=9, parts=4, least=0.0231),
    "antidiagonals": dict(keep=4, parts=8, weight=None),
    "clusters, coverage": dict(keep=10**6, coverage=0.83, sink=0, parts=4),
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_best_blocks(budget: dict[str, Any]) -> None:
    g, rows, first, last, k_tiles = 3, 2, 1, 12, 21
    blocks = blocks_of(rows * g, rows, 14, k_tiles, **budget)
    reached = torch.randint(0, k_tiles + 1, (rows, last - first), generator=generator(7), dtype=torch.int32)
    reached[0, :3] = torch.tensor([0, 1, k_tiles])
    got = best_blocks(blocks, first, last, reached)
    want, margin = choices(blocks, reached.tolist(), g, first)
    assert margin > 1e-6
    assert got.shape == (rows * g, last - first, k_tiles)
    assert [[set(torch.where(row)[0].tolist()) for row in head] for head in got] == want


def natural(
    prefix: int, queries: int, heads: tuple[tuple[int, ...], ...], sink: int = 0, **budget: Any
) -> tuple[HeadGroup, int]:
    """Keys and queries in prompt order, `sink` tiles of keys in a segment of their own; the segment with blocks."""
    keys, rows = prefix + queries, len(heads)
    bounds = [0, sink * TILE, keys] if sink else [0, keys]
    start = torch.tensor([bounds] * rows, dtype=torch.int32)
    blocks = blocks_of(rows * len(heads[0]), rows, -(-queries // TILE), -(-keys // TILE) - sink, **budget)
    segments = (Segment(), Segment(blocks=blocks)) if sink else (Segment(blocks=blocks),)
    group = HeadGroup(
        pattern=Dense(), prefix=prefix, queries=queries, heads=heads, kv_head=tuple(range(rows)), q_order=None,
        k_order=None, start=start, rank=None, limits=tiles.limits(start, None, None, prefix, queries),
        segments=segments, width=-(-keys // TILE), tile_lists=tiles.tile_lists,
    )  # fmt: skip
    return group, len(segments) - 1


def gathered(
    prefix: int, queries: int, heads: tuple[tuple[int, ...], ...], some: bool, **budget: Any
) -> tuple[HeadGroup, int]:
    """Other columns kept by every row, two classes of keys after them, and every key but `some` of the queries."""
    keys, rows = prefix + queries, len(heads)
    kept = torch.rand(rows, keys, generator=generator(8)) < torch.tensor([0.1, 0.3, 0.0])[:rows, None]
    by_class = (torch.arange(keys) % 300 < 100).int() + 1
    order, start, rank = key_order(kept, by_class, 3, -(-keys // TILE) + 2)
    q_order = None
    if some:
        at = torch.where(torch.rand(queries, generator=generator(9)) < 0.6)[0].int() + prefix
        q_order = torch.full((rows, -(-len(at) // TILE) * TILE), PAD, dtype=torch.int32)
        q_order[:, : len(at)] = at
    limits = tiles.limits(start, rank, q_order, prefix, queries)
    number = -(-int(by_class.eq(2).sum()) // TILE)
    blocks = blocks_of(rows * len(heads[0]), rows, limits.shape[2] // TILE, number, **budget)
    group = HeadGroup(
        pattern=Dense(), prefix=prefix, queries=queries, heads=heads, kv_head=tuple(range(rows)), q_order=q_order,
        k_order=order, start=start, rank=rank, limits=limits, segments=(Segment(), Segment(), Segment(blocks=blocks)),
        width=order.shape[1] // TILE, tile_lists=tiles.tile_lists,
    )  # fmt: skip
    return group, 2


def moved(group: HeadGroup, device: str, dtype: torch.dtype) -> HeadGroup:
    def to(x: torch.Tensor | None) -> Any:
        return None if x is None else x.to(device)

    def segment(s: Segment) -> Segment:
        b = s.blocks
        if b is None:
            return s
        return Segment(blocks=replace(b, q=b.q.to(device, dtype), k=b.k.to(device, dtype), weight=to(b.weight)))

    return replace(
        group, q_order=to(group.q_order), k_order=to(group.k_order), start=to(group.start), rank=to(group.rank),
        limits=to(group.limits), segments=tuple(map(segment, group.segments)),
    )  # fmt: skip


def empty_lists(group: HeadGroup, first: int, last: int, width: int, filled: int) -> TileLists:
    """Lists of -1 with `filled` entries that earlier segments might have left, numbered from 1000."""
    shape = (len(group.heads) * len(group.heads[0]), last - first)
    index = torch.full((*shape, width), -1, dtype=torch.int32)
    index[..., :filled] = torch.arange(1000, 1000 + filled)
    count = torch.full(shape, filled, dtype=torch.int32)
    return TileLists(
        first=first, full_count=count, full_index=index, partial_count=count.clone(), partial_index=index.clone()
    )


def expected_lists(
    group: HeadGroup, s: int, lists: TileLists, first: int, last: int
) -> tuple[list[torch.Tensor], float]:
    """Counts and lists of full tiles, then of partial ones, as they should be after append_blocks; the margin."""
    g, blocks = len(group.heads[0]), group.segments[s].blocks
    assert blocks is not None
    reached = tiles.reached_tiles(group, s, first, last)
    want, margin = choices(blocks, reached.tolist(), g, first)
    got = [x.clone() for x in (lists.full_count, lists.full_index, lists.partial_count, lists.partial_index)]
    for member, rows in enumerate(want):
        r = member // g
        if group.heads[r][member % g] < 0:
            continue
        for m, taken in enumerate(rows):
            limit = [x for x in group.limits[r, s].view(-1, TILE)[first + m].tolist() if x >= 0]
            for n in sorted(taken):
                tile = n + int(group.start[r, s]) // TILE
                count, index = got[:2] if (tile + 1) * TILE <= min(limit) else got[2:]
                if count[member, m] < index.shape[2]:
                    index[member, m, count[member, m]] = tile
                    count[member, m] += 1
    return got, margin


def compare(
    group: HeadGroup, s: int, device: str, dtype: torch.dtype, first: int, last: int, width: int, filled: int = 0
) -> list[torch.Tensor]:
    lists = empty_lists(group, first, last, width, filled)
    want, margin = expected_lists(group, s, lists, first, last)
    assert margin > 1e-5  # no rounding can flip a choice
    on = TileLists(
        first=first, full_count=lists.full_count.to(device), full_index=lists.full_index.to(device),
        partial_count=lists.partial_count.to(device), partial_index=lists.partial_index.to(device),
    )  # fmt: skip
    blocks_gpu.append_blocks(moved(group, device, dtype), s, on, first, last)
    for a, b in zip((on.full_count, on.full_index, on.partial_count, on.partial_index), want, strict=True):
        assert torch.equal(a.cpu(), b)  # the poison past the count too: nothing is written there
    return want


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@DTYPES
def test_append_blocks_budgets(device: str, dtype: torch.dtype, budget: dict[str, Any]) -> None:
    group, s = natural(1000, 500, GQA["fillers"], **budget)
    compare(group, s, device, dtype, 0, 4, group.width)


@pytest.mark.parametrize("heads", GQA.values(), ids=GQA)
@pytest.mark.parametrize("prefix, queries", [(0, 1), (0, 600), (129, 300), (1300, 129), (611, 1)])
@pytest.mark.parametrize("order", ["natural", "sink", "keys", "keys and queries"])
@DEVICES
def test_append_blocks_orders(
    device: str, order: str, prefix: int, queries: int, heads: tuple[tuple[int, ...], ...]
) -> None:
    if order in ("natural", "sink"):
        group, s = natural(prefix, queries, heads, sink=2 if order == "sink" and prefix + queries > 2 * TILE else 0)
    else:
        group, s = gathered(prefix, queries, heads, some=order == "keys and queries")
    compare(group, s, device, torch.float32, 0, group.query_tiles, group.width)


@DEVICES
def test_append_blocks_after_other_segments_for_some_query_tiles(device: str) -> None:
    group, s = natural(700, 900, GQA["7:1"], sink=1)
    compare(group, s, device, torch.float32, 2, 7, group.width + 3, filled=3)


@DEVICES
def test_append_blocks_never_writes_past_the_lists(device: str) -> None:
    group, s = natural(1300, 300, GQA["1:1"], keep=9)
    full_count, *_ = compare(group, s, device, torch.float32, 0, 3, 5, filled=2)
    assert (full_count == 5).all()


@pytest.mark.parametrize("scratch", [1, 40_000])
@DEVICES
def test_append_blocks_in_slices(device: str, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_gpu, "SCRATCH", scratch)
    for group, s in (natural(400, 1500, GQA["7:1"]), gathered(400, 1500, GQA["7:1"], some=True)):
        compare(group, s, device, torch.float32, 1, group.query_tiles, group.width)


@triton.jit  # type: ignore[untyped-decorator]
def _store_total(x_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr, blocks_gpu._total(tl.load(x_ptr + at, mask=at < count, other=0.0)))


@DEVICES
def test_a_total_has_the_same_bits_in_any_order_and_block(device: str) -> None:
    x, found = torch.rand(500, generator=generator(15)), set()
    for values in (x, x.flip(0), x[torch.randperm(500, generator=generator(16))]):
        for block, warps in ((512, 1), (1024, 2), (8192, 16)):
            out = torch.zeros(1, device=device)
            _store_total[(1,)](values.contiguous().to(device), out, 500, BLOCK=block, num_warps=warps)
            found.add(float(out))
    (total,) = found
    assert total == pytest.approx(float(x.double().sum()), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 4])
@DEVICES
def test_slices_choose_as_the_whole_does(device: str, parts: int) -> None:
    """Random scores, and budgets by sums over them: a rank of several has other slices, in blocks of other sizes."""
    group, s = natural(511 * TILE, 500, ((0, 1, 2, 3),), keep=90, coverage=0.9, least=1e-4, parts=parts)
    blocks = group.segments[s].blocks
    assert blocks is not None
    q, k = (torch.randn(x.shape, generator=generator(n)) for n, x in ((13, blocks.q), (14, blocks.k)))
    group = moved(replace(group, segments=(Segment(blocks=replace(blocks, q=q, k=k)),)), device, torch.float32)
    count = group.query_tiles

    def lists(first: int, last: int) -> TileLists:
        made = empty_lists(group, first, last, group.width, 0)
        made = TileLists(first=first, **{k: v.to(device) for k, v in vars(made).items() if k != "first"})
        blocks_gpu.append_blocks(group, s, made, first, last)
        return made

    whole = lists(0, count)
    assert (whole.full_count[:, 0] > 20).all()
    for first, last in ((0, 1), (1, 3), (3, count)):  # tile 0 sees 512 tiles, the others more
        own = lists(first, last)
        for name in ("full_count", "full_index", "partial_count", "partial_index"):
            assert torch.equal(getattr(own, name), getattr(whole, name)[:, first:last]), (name, first)


@pytest.mark.parametrize("k_tiles", [129, 2049, 32768])  # a lone tile in the last block of scores, and none
@pytest.mark.parametrize("budget", [dict(keep=70), dict(keep=10**6, coverage=0.77)], ids=["count", "coverage"])
@DTYPES
def test_append_blocks_of_long_rows(device: str, dtype: torch.dtype, budget: dict[str, Any], k_tiles: int) -> None:
    if device == "cpu" and k_tiles > 4096:
        pytest.skip("20 s in Triton's interpreter")
    group, s = natural(k_tiles * TILE - 130, 130, ((0,),), local=0, **budget)
    compare(group, s, device, dtype, 0, 2, 4096)


@DEVICES
def test_random_scores_choose_as_the_reference_does(device: str) -> None:
    """Scores of all sizes and signs; those so close that rounding may swap them are left out."""
    group, s = natural(9000, 200, GQA["7:1"], keep=20)
    blocks = group.segments[s].blocks
    assert blocks is not None
    q = torch.randn(blocks.q.shape, generator=generator(10)) * torch.logspace(-12, 4, 14)[:, None, None]
    blocks = replace(blocks, q=q, k=torch.randn(blocks.k.shape, generator=generator(11)))
    group = replace(group, segments=(Segment(blocks=blocks),))
    reached = tiles.reached_tiles(group, s, 0, 2)
    want = best_blocks(blocks, 0, 2, reached)
    lists = empty_lists(group, 0, 2, group.width, 0)
    lists = TileLists(first=0, **{k: v.to(device) for k, v in vars(lists).items() if k != "first"})
    blocks_gpu.append_blocks(moved(group, device, torch.float32), s, lists, 0, 2)
    score = torch.einsum("gme,gne->gmn", q.double(), blocks.k.double().repeat_interleave(7, 0))
    compared = 0
    for member in range(14):
        for m in range(2):
            kept = want[member, m]
            visible = torch.arange(len(kept)) < reached[0, m]
            free = kept & (torch.arange(len(kept)) > 0) & (torch.arange(len(kept)) < reached[0, m] - 1)
            gap = score[member, m, free].min() - score[member, m, visible & ~kept].max()
            if gap > 1e-5 * score[member, m].abs().max():
                listed = lists.full_index[member, m, : int(lists.full_count[member, m])].tolist()
                listed += lists.partial_index[member, m, : int(lists.partial_count[member, m])].tolist()
                assert listed == torch.where(kept)[0].tolist()
                compared += 1
    assert compared >= 25


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    group, s = natural(1000, 500, GQA["7:1"], coverage=0.9)
    group, lists = moved(group, "cuda", torch.bfloat16), empty_lists(group, 0, 4, group.width, 0)
    lists = TileLists(first=0, **{k: v.cuda() for k, v in vars(lists).items() if k != "first"})
    x, order = torch.randn(500, 14, 128, device="cuda"), orders(2, 1000, 500, 5).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        blocks_gpu.append_blocks(group, s, lists, 0, 4)
        estimate_gpu.pool(x, order, None, group.heads, 4, False, 1000, 500)
        estimate_gpu.clusters(x, None, None, group.kv_head, 500)
    finally:
        torch.cuda.set_sync_debug_mode("default")
