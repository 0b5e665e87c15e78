"""Watching a server's sparse prefills: metrics, a recall probe, and the guard that gives poor heads more. No waiting.

Recall of a query is exp(its sparse log-sum-exp - its dense one): exactly the share of the dense softmax that was
attended. The dense one is computed for a few rows of a chunk; what the device counts is read two batches later, so the
guard acts on a head's next chunks and not on the one that it judged, once a batch: by the poorest of its chunks.
Context-parallel ranks each know the recall of the rows that they ran and put it together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mm_sglang.config import SparseConfig
from mm_sglang.guard import GuardedRecipes, Recipes
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.inspection import attended_shares, tile_counts_on_device
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.plan import Plan, device_ints, evenly
from mm_sglang.kernels.share import Team
from mm_sglang.kernels.stages import StageTimer
from mm_sglang.metrics import Metrics


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
    first_head: number in the model of the first head here.
    """

    def __init__(
        self, config: SparseConfig, recipes: Sequence[Recipes | None], engine: Engine, metrics: Metrics, *, cuda: bool,
        metered: bool, team: Team | None = None, first_head: int = 0,
    ) -> None:  # fmt: skip
        self.engine, self.metrics, self.cuda, self.team = engine, metrics, cuda, team
        self.recipes = GuardedRecipes(recipes, config.guard, metrics, first_head)
        self.guard = config.guard
        # Who has no metrics measures only for a team, of which all gather or none
        self.probe = config.probe if metrics.on or (metered and team is not None) else None
        self.later = Later()
        self.batches = 0
        self.timed: list[StageTimer] = []
        self._measured: dict[int, list[tuple[torch.Tensor, tuple[int, ...]]]] = defaultdict(list)
        self._layers = [layer for layer, r in enumerate(recipes) if r is not None]

    def begin(self, dense: Sequence[tuple[str, int, str]], sparse: Sequence[int]) -> None:
        """A prefill batch: (reason, tokens, request) of its dense chunks, tokens of its sparse ones."""
        self.later.poll()
        for layer, of_chunks in self._measured.items():  # all of one batch, so at the same levels
            self.recipes.judge(layer, torch.stack([recall for recall, _ in of_chunks]).amin(0), of_chunks[0][1])
        self._measured.clear()
        while self.timed and self.timed[0].done():
            self.metrics.stages(self.timed.pop(0).milliseconds())
        for reason, tokens, rid in dense:
            self.metrics.dense_chunk(reason, tokens, rid)
        for tokens in sparse:
            self.metrics.sparse_chunk(tokens)
        self.batches += bool(sparse)

    def _in_turn(self, layer: int, every: int = 1) -> bool:
        """One layer each `every` batches pays for the metrics of all, the next one each time."""
        turn, rest = divmod(self.batches, every)
        return rest == 0 and layer == self._layers[turn % len(self._layers)]

    def timer(self, layer: int) -> StageTimer | None:
        """A StageTimer for this layer's chunk, if its stages are to be measured."""
        if not (self.cuda and self.metrics.on and self._in_turn(layer)):
            return None
        self.timed.append(StageTimer())
        return self.timed[-1]

    def after(self, done: Done) -> None:
        """Look at what a layer did."""
        layer = done.layer
        if self.metrics.on and self._in_turn(layer):
            causal = done.plan.causal_tiles * done.plan.heads
            self.later.put(tile_counts_on_device(done.plan), lambda n: self.metrics.tiles(int(n), causal))
        probe = self.probe if self.probe is not None and self._in_turn(layer, self.probe.every) else None
        guard = self.guard if self.guard is not None and self.batches % self.guard.every == 0 else None
        settings = guard or probe
        if settings is None:
            return
        levels = self.recipes.levels(layer)

        def use(by_head: torch.Tensor) -> None:
            if probe is not None:
                self.metrics.recall(by_head)
            if guard is not None:
                self._measured[layer].append((by_head, levels))

        self.later.put(recall_by_head(done, settings.rows, self.engine, self.team), use)


def recall_by_head(done: Done, rows: int, engine: Engine, team: Team | None = None) -> torch.Tensor:
    """fp32 [H] on the device: mean recall of `rows` queries spread over the chunk's second half.

    A team's ranks, whose lse is NaN where they did not run, all get the same bits.
    """
    queries = len(done.q)
    first = queries // 2
    picked = tuple(first + n for n in evenly(queries - first, rows))
    at = device_ints(picked, done.q.device)
    prefix = done.layout.length - queries
    dense = engine.ops().row_lse(done.q, done.pool, done.slots, at, prefix, done.scale)
    shares = attended_shares(done.lse[at.long()].T, dense)  # [H, L]
    if team is not None:  # each row was run by one of them, or alike by several, or last with every key
        shares = team.gather(shares.nan_to_num(0.0))().view(team.size, *shares.shape).amax(0)
    return shares.mean(1)
