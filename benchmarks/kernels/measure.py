"""Times, memory, tiles and recall of one case on one GPU. Medians of CUDA-event times, contestants taking turns.

Calls are queued without waiting in between, as in a model, so a launch is paid for only where the device runs dry.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.kernels import rows
from benchmarks.kernels.cases import Case
from benchmarks.kernels.planted import layout_of, planted
from benchmarks.kernels.work import stage_work
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.plan import TILE, Plan
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.kernels.stages import STAGES, StageTimer

HEAD_DIM = 128
SAMPLED_ROWS = 64
LEAST, MOST, ENOUGH_MS = 5, 30, 1000.0  # repeats at least and at most, and the time after which no more are needed
SLOW_MS = 1000.0  # calls slower than that are run twice, and from five times that once: their spread is small
FIRST_STEP = 12.0  # seconds: a guess for lengths that nothing is known of
Call = Callable[[], Any]


@dataclass(kw_only=True)
class Row:
    """One contestant on one shape, length and inputs. Times in ms, rates in TFLOP/s, memory in GB."""

    shape: str
    tokens: int
    case: str
    contestant: str
    inputs: str = ""
    note: str = ""
    ms: float | None = None
    times: list[float] = field(default_factory=list)
    tflops: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    work: dict[str, tuple[float, float]] = field(default_factory=dict)
    overhead: float | None = None
    tiles: int | None = None
    partial: float | None = None
    density: float | None = None
    recall: float | None = None
    worst_recall: float | None = None
    error_ratio: float | None = None
    extra_gb: float | None = None
    missing: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Milliseconds of each call, all of them in turn.

    The first readings only warm up and say how often a call is worth repeating, but count for calls of SLOW_MS: those
    have to be compiled before.
    """
    first = {name: _queue({name: call})[name][0] for name, call in calls.items()}
    if max(first.values()) < SLOW_MS / 10:
        first = {name: taken[0] for name, taken in _queue(calls).items()}
    left = {name: _repeats(ms) for name, ms in first.items()}
    kept = {name: [ms] if ms >= SLOW_MS else [] for name, ms in first.items()}
    while any(left.values()):
        batch = {name: calls[name] for name, number in left.items() if number}
        for name, taken in _queue(batch, min(left[n] for n in batch)).items():
            kept[name] += taken
            left[name] -= len(taken)
    return kept


def _repeats(ms: float) -> int:
    if ms >= SLOW_MS:
        return 0 if ms >= 5 * SLOW_MS else 1
    return min(max(LEAST, int(ENOUGH_MS / max(ms, 1e-3))), MOST)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _queue(calls: dict[str, Call], rounds: int = 1) -> dict[str, list[float]]:
    marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(rounds):
        for name, call in calls.items():
            start, end = _event(), _event()
            start.record()
            result = call()
            end.record()
            del result
            marks.append((name, start, end))
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, start, end in marks:
        times[name].append(start.elapsed_time(end))
    return times


def causal_flops(tokens: int, heads: int) -> float:
    """Of dense causal attention, by tiles as for ours: what is masked inside the diagonal's tiles counts too."""
    tiles = -(-tokens // TILE)
    return 4.0 * TILE * TILE * HEAD_DIM * heads * tiles * (tiles + 1) / 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A case's tensors on the device."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    layout: TokenLayout
    patterns: Sequence[HeadPattern]
    engine: Engine

    @classmethod
    def of(
        cls, case: Case, tokens: int, heads: tuple[int, int], engine: Engine, seed: int, device: torch.device
    ) -> Prepared:
        q, k, v, _ = planted(
            case.inputs, tokens=tokens, q_heads=heads[0], kv_heads=heads[1], head_dim=HEAD_DIM, seed=seed, device=device
        )
        layout = layout_of(case.inputs, tokens, device)
        return cls(q=q, k=k, v=v, layout=layout, patterns=case.patterns(tokens, *heads), engine=engine)

    def run(self) -> tuple[torch.Tensor, torch.Tensor, Plan]:
        return sparse_prefill(
            self.q, self.k, self.v, layout=self.layout, patterns=self.patterns, scale=HEAD_DIM**-0.5, engine=self.engine
        )


def measure(row: Row, it: Prepared, others: dict[str, Call], seed: int, stages: bool = True) -> dict[str, list[float]]:
    """Fill `row` with ours; the times of all contestants, ours under row.contestant."""
    it.run()  # compiles and tunes
    if stages:
        row.extra_gb = _extra_gb(it)
    times = interleaved({row.contestant: it.run, **others})
    row.times = times[row.contestant]
    row.ms = statistics.median(row.times)
    _exact(row, it, seed)
    if stages:
        _stages(row, it)
    return times


def _extra_gb(it: Prepared) -> float:
    """Peak memory beyond inputs and outputs, with a layout that no layer has used yet; kernels are compiled already."""
    fresh = Prepared(
        q=it.q, k=it.k, v=it.v, patterns=it.patterns, engine=it.engine,
        layout=TokenLayout(items=it.layout.items, length=it.layout.length, device=it.layout.device),
    )  # fmt: skip
    _ = fresh.layout.coordinates
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse, plan = fresh.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return (peak - out.nbytes - lse.nbytes) / 1e9


def _stages(row: Row, it: Prepared) -> None:
    """Each stage's median, and the share of the whole that is not attention: gaps between stages count as overhead."""
    assert row.tiles is not None
    taken, whole = [], []
    for _ in range(LEAST if (row.ms or 0.0) < SLOW_MS / 5 else 3):
        start, end = _event(), _event()
        with StageTimer() as timer:
            start.record()
            plan = it.run()[2]
            end.record()
        taken.append(timer.milliseconds())
        whole.append(start.elapsed_time(end))
    row.stages = {name: statistics.median(t[name] for t in taken) for name in STAGES}
    attend = row.stages["attend"]
    row.overhead = statistics.median(1 - t["attend"] / w for t, w in zip(taken, whole, strict=True))
    row.work = stage_work(plan, it.q, it.k, row.tiles)
    row.tflops = row.work["attend"][0] / attend / 1e9 if attend > 0 else None


def _exact(row: Row, it: Prepared, seed: int) -> None:
    """Recall, error, tiles; a row whose plan shows keys of the future counts as infinitely wrong."""
    out, _, plan = it.run()
    positions = rows.sample(len(it.q), 0, SAMPLED_ROWS, seed, late=True).to(it.q.device)
    seen = rows.look(plan, positions)
    result = rows.exactness(it.q, it.k, it.v, out, positions, seen.masks, HEAD_DIM**-0.5)
    row.tiles, row.partial = seen.tiles, seen.partial / max(seen.tiles, 1)
    row.density = seen.tiles / (plan.causal_tiles * plan.heads)
    row.recall, row.worst_recall = float(result.recall.mean()), float(result.recall.min())
    row.error_ratio = rows.WRONG if seen.future else result.ratio


def rival_row(shape: str, tokens: int, name: str, times: list[float], flops: float | None, note: str = "") -> Row:
    """A rival's times as a row."""
    ms = statistics.median(times)
    rate = None if flops is None else flops / ms / 1e9
    return Row(shape=shape, tokens=tokens, case=name, contestant=name, ms=ms, times=times, tflops=rate, note=note)


class Clock:
    """Time that may be spent, and a guess of what a step will take from what steps like it took."""

    def __init__(self, budget: float | None) -> None:
        self.start, self.budget = time.monotonic(), budget
        self.cost: dict[int, float] = {}  # dearest step so far, by length

    def spent(self) -> float:
        return time.monotonic() - self.start

    def allows(self, tokens: int, more: float = 0.0) -> bool:
        """Whether a step at this length, and `more` seconds, are likely to end within the budget."""
        if self.budget is None:
            return True
        # A first step at some length mostly compiles, which says nothing of other lengths.
        guess = 1.3 * self.cost.get(tokens, FIRST_STEP) + more
        return self.spent() + guess < self.budget

    def took(self, tokens: int, seconds: float) -> None:
        self.cost[tokens] = max(self.cost.get(tokens, 0.0), seconds)


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a table's foot."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
