"""The guard: heads whose measured recall is poor get more, and give it back when they no longer need it.

A head is raised a level at a measurement under the mark: budgets doubled, at most `grow` times, and then dense, unless
the setting forbids it. It comes down a level after PATIENCE measurements in a row that are good, which is halfway from
the mark to everything at least; each time a head that came down has to be raised again, it stays up for twice as many.
So prompts unlike the rest cost later ones something for a while, and a head between two levels changes ever less often.
What is decided follows from measurements and their order alone: ranks that have the same decide alike.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mm_sglang.config import Guard
from mm_sglang.kernels.patterns import Dense, HeadPattern
from mm_sglang.metrics import Metrics

log = logging.getLogger(__name__)
Recipes = tuple[HeadPattern, ...]
PATIENCE = 32
MOST_PATIENCE = 1 << 14


class _Head:
    """level: times raised. good: measurements in a row. patience: of them for a level down. came_down: by itself."""

    def __init__(self) -> None:
        self.level, self.good, self.patience, self.came_down = 0, 0, PATIENCE, False

    def judge(self, share: float, coverage: float, most: int) -> int:
        """How far the level changes by a batch's recall: up, down, or 0."""
        if share < coverage:
            self.good = 0
            if self.level == most:
                return 0
            if self.came_down:
                self.patience, self.came_down = min(2 * self.patience, MOST_PATIENCE), False
            self.level += 1
            return 1
        self.good = self.good + 1 if share >= (1 + coverage) / 2 else 0
        if self.level == 0 or self.good < self.patience:
            return 0
        self.level, self.good, self.came_down = self.level - 1, 0, True
        return -1


class GuardedRecipes:
    """Recipes by layer as they are now, raised where the guard found them poor.

    first_head: number in the model of the first head here, for the log.
    """

    def __init__(
        self, recipes: Sequence[Recipes | None], guard: Guard | None, metrics: Metrics, first_head: int = 0
    ) -> None:
        self.base, self.guard, self.metrics, self.first_head = list(recipes), guard, metrics, first_head
        self.now = list(recipes)
        self._heads = [[_Head() for _ in r or ()] for r in recipes]

    def levels(self, layer: int) -> tuple[int, ...]:
        """Of the layer's heads now: what a measurement made now is of."""
        return tuple(head.level for head in self._heads[layer])

    def judge(self, layer: int, recall: torch.Tensor, levels: Sequence[int]) -> None:
        """Raise or lower a layer's heads by one batch's recall (fp32 [H], CPU), measured at `levels`.

        Heads that were at another level then are left alone: it says nothing of what they run now.
        """
        base, guard = self.base[layer], self.guard
        if guard is None or base is None:
            return
        changed = False
        for number, (head, share, level) in enumerate(zip(self._heads[layer], recall.tolist(), levels, strict=True)):
            if level != head.level or isinstance(base[number], Dense):
                continue
            change = head.judge(share, guard.coverage, guard.grow + guard.dense)
            if change == 0:
                continue
            changed = True
            action = "lowered" if change < 0 else "dense" if head.level > guard.grow else "grown"
            self.metrics.guarded(action)
            log.info(
                "mm_sparse: guard: layer %d head %d has recall %.3f, mark %.3f: %s, level %d",
                layer, self.first_head + number, share, guard.coverage, action, head.level,
            )  # fmt: skip
        if changed:
            self.now[layer] = tuple(
                Dense() if head.level > guard.grow else pattern.scaled(2**head.level)
                for pattern, head in zip(base, self._heads[layer], strict=True)
            )
