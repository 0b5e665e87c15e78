"""Where a sparse prefill's time goes: CUDA events round every stage, read only when asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

STAGES = ("estimate", "select", "permute", "plan", "attend", "merge")


class StageTimer:
    """`with StageTimer() as t: sparse_prefill(...)`, then `t.milliseconds()`; not for several threads at once."""

    _active: StageTimer | None = None

    def __init__(self) -> None:
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> StageTimer:
        StageTimer._active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        StageTimer._active = None

    def done(self) -> bool:
        """Whether the device has passed the last mark."""
        return not self._marks or bool(self._marks[-1][2].query())  # type: ignore[no-untyped-call]

    def milliseconds(self) -> dict[str, float]:
        """Device time by stage, summed over its calls; waits for the last mark, so not at all once `done`."""
        if self._marks:
            self._marks[-1][2].synchronize()
        total = dict.fromkeys(STAGES, 0.0)
        for name, start, end in self._marks:
            total[name] += start.elapsed_time(end)
        return total


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Marks the launches inside as one of STAGES; does nothing unless a StageTimer is active."""
    timer = StageTimer._active
    if timer is None:
        yield
        return
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    yield
    end.record()
    timer._marks.append((name, start, end))
