"""Watching a server's sparse prefills: metrics, a recall probe, and the guard that gives poor heads more. No waiting.

Recall of a query is exp(its sparse log-sum-exp - its dense one): exactly the share of the dense softmax that was
attended. The dense one is computed for a few rows of a chunk; what the device counts is read two batches later, so the
guard acts on a head's next chunks and not on the one that it judged. Context-parallel ranks each know the recall of the
rows that they ran and put it together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mm_sglang.config import Guard, SparseConfig
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.inspection import attended_shares, tile_counts_on_device
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import Dense, HeadPattern
from mm_sglang.kernels.plan import Plan, device_ints
from mm_sglang.kernels.share import Team
from mm_sglang.kernels.stages import StageTimer
from mm_sglang.metrics import Metrics

log = logging.getLogger(__name__)
Recipes = tuple[HeadPattern, ...]


class Later:
    """Device numbers on their way to the host, each with what to do two batches on.

    Not as soon as they are there: what the guard does would depend on the clock, and differ from rank to rank. SGLang
    has read a batch's tokens before it starts the next but one, so the device is done with them and nothing waits.
    """

    def __init__(self) -> None:
        self.batch = 0
        self.waiting: list[tuple[int, torch.Tensor, torch.cuda.Event | None, Callable[[torch.Tensor], None]]] = []

    def put(self, values: torch.Tensor, use: Callable[[torch.Tensor], None]) -> None:
        """Start the copy; `use` gets a CPU tensor at a later `poll`."""
        if values.device.type == "cpu":
            self.waiting.append((self.batch, values, None, use))
            return
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self.waiting.append((self.batch, host, event, use))

    def poll(self) -> None:
        """A batch begins: use what was put two batches ago or earlier, in order."""
        self.batch += 1
        while self.waiting and self.waiting[0][0] <= self.batch - 2:
            _, host, event, use = self.waiting.pop(0)
            if event is not None:
                event.synchronize()
            use(host)


class GuardedRecipes:
    """Recipes by layer, and how far the guard has raised each head: budgets doubled `grow` times, then dense."""

    def __init__(self, recipes: Sequence[Recipes | None], guard: Guard | None, metrics: Metrics) -> None:
        self.base, self.guard, self.metrics = list(recipes), guard, metrics
        self.now = list(recipes)
        self.level = [[0] * len(r or ()) for r in recipes]

    def judge(self, layer: int, recall: torch.Tensor) -> None:
        """Raise the heads of a layer whose mean recall (fp32 [H], CPU) is under the mark."""
        base = self.base[layer]
        if self.guard is None or base is None:
            return
        changed = False
        for head, share in enumerate(recall.tolist()):
            level = self.level[layer][head]
            if share >= self.guard.coverage or isinstance(base[head], Dense) or level > self.guard.grow:
                continue
            self.level[layer][head] = level + 1
            action = "dense" if level == self.guard.grow else "grown"
            self.metrics.guarded(action)
            changed = True
            log.info(
                "mm_sparse: guard: layer %d head %d has recall %.3f < %.3f: %s",
                layer, head, share, self.guard.coverage, action,
            )  # fmt: skip
        if changed:
            self.now[layer] = tuple(
                Dense() if level > self.guard.grow else pattern.scaled(2**level)
                for pattern, level in zip(base, self.level[layer], strict=True)
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """One chunk's sparse prefill in one layer, as the backend ran it."""

    layer: int
    q: torch.Tensor
    lse: torch.Tensor
    pool: torch.Tensor
    slots: torch.Tensor
    layout: TokenLayout
    plan: Plan
    scale: float


class Watch:
    """What the backend calls; everything is off unless settings or --enable-metrics ask for it.

    metered: the server has --enable-metrics; `metrics` are on in one of its ranks only.
    team: ranks that run one chunk together, each some of its rows.
    """

    def __init__(
        self, config: SparseConfig, recipes: Sequence[Recipes | None], engine: Engine, metrics: Metrics, *, cuda: bool,
        metered: bool, team: Team | None = None,
    ) -> None:  # fmt: skip
        self.config, self.engine, self.metrics, self.cuda = config, engine, metrics, cuda
        self.metered, self.team = metered, team
        self.recipes = GuardedRecipes(recipes, config.guard, metrics)
        self.later = Later()
        self.chunks = 0
        self.timed: list[StageTimer] = []
        self._layers = [layer for layer, r in enumerate(recipes) if r is not None]

    def begin(self, dense: Sequence[tuple[str, int]], sparse: Sequence[int]) -> None:
        """A prefill batch: (reason, tokens) of its dense chunks, tokens of its sparse ones."""
        self.later.poll()
        while self.timed and self.timed[0].done():
            self.metrics.stages(self.timed.pop(0).milliseconds())
        for reason, tokens in dense:
            self.metrics.dense_chunk(reason, tokens)
        for tokens in sparse:
            self.metrics.sparse_chunk(tokens)
        self.chunks += bool(sparse)

    def _in_turn(self, layer: int) -> bool:
        """One layer a batch pays for the metrics of all."""
        return layer == self._layers[self.chunks % len(self._layers)]

    def timer(self, layer: int) -> StageTimer | None:
        """A StageTimer for this layer's chunk, if its stages are to be measured."""
        if not (self.cuda and self.metrics.on and self._in_turn(layer)):
            return None
        self.timed.append(StageTimer())
        return self.timed[-1]

    def after(self, done: Done) -> None:
        """Look at what a layer did."""
        in_turn = self._in_turn(done.layer)
        if self.metrics.on and in_turn:
            causal = done.plan.causal_tiles * done.plan.heads
            self.later.put(tile_counts_on_device(done.plan), lambda n: self.metrics.tiles(int(n), causal))
        probe, guard = self.config.probe, self.config.guard
        probed = probe is not None and self.chunks % probe.every == 0 and (in_turn or not self.metered)
        guarded = guard is not None and self.chunks % guard.every == 0
        if not (probed or guarded):
            return
        rows = (guard if guarded and guard is not None else probe).rows  # type: ignore[union-attr]
        layer = done.layer

        def use(by_head: torch.Tensor) -> None:
            if probed:
                self.metrics.recall(by_head)
            if guarded:
                self.recipes.judge(layer, by_head)

        self.later.put(recall_by_head(done, rows, self.engine, self.team), use)


def recall_by_head(done: Done, rows: int, engine: Engine, team: Team | None = None) -> torch.Tensor:
    """fp32 [H] on the device: mean recall of `rows` queries spread over the chunk's second half.

    A team's ranks, whose lse is NaN where they did not run, all get the same bits.
    """
    queries = len(done.q)
    first = queries // 2
    count = min(rows, queries - first)
    picked = tuple(first + (n + 1) * (queries - first) // count - 1 for n in range(count))
    at = device_ints(picked, done.q.device)
    prefix = done.layout.length - queries
    dense = engine.ops().row_lse(done.q, done.pool, done.slots, at, prefix, done.scale)
    shares = attended_shares(done.lse[at.long()].T, dense)  # [H, L]
    if team is not None:  # each row was run by one of them, or alike by several, or last with every key
        shares = team.gather(shares.nan_to_num(0.0))().view(team.size, *shares.shape).amax(0)
    return shares.mean(1)
