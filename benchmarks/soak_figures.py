"""What a soak has seen: kept in a file from run to run, summed up, held against the marks."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mm_sglang.demo.tables import machine

Fault = dict[str, Any]
NOTICED_S, BACK_S = 5.0, 60.0  # the marks, on a machine that does nothing else


class Keeper:
    """The faults that are over and the figures of whole runs, in the JSON file `out` if there is to be one.

    Raises:
        ValueError: the file was begun with another seed.
    """

    def __init__(self, out: Path | None, seed: int) -> None:
        self.out, self.seed = out, seed
        self.done: list[Fault] = []
        self.runs: list[dict[str, Any]] = []
        if out is not None and out.exists():
            known = json.loads(out.read_text())
            if known["seed"] != seed:
                raise ValueError(f"--seed {seed}: {out} was begun with --seed {known['seed']}")
            self.done, self.runs = known["done"], known["runs"]

    def add(self, fault: Fault) -> None:
        self.done.append(fault)
        self._write()

    def end(self, run: dict[str, Any]) -> None:
        """Of a run in which every promise was held."""
        self.runs.append(run)
        self._write()

    def _write(self) -> None:
        if self.out is None:
            return
        figures = {"machine": machine(), "seed": self.seed, **summary(self.done), "runs": self.runs, "done": self.done}
        scratch = self.out.with_name(f".{self.out.name}.tmp")
        scratch.write_text(json.dumps(figures, indent=1) + "\n")
        scratch.replace(self.out)


def times(done: Iterable[Fault]) -> Iterator[tuple[str, list[float]]]:
    for name in ("noticed_s", "back_s", "free_s"):
        if values := [fault[name] for fault in done if name in fault]:
            yield name, values


def summary(done: list[Fault]) -> dict[str, Any]:
    """How many of each kind, and how long they took."""
    figures = {
        name: {"median": round(statistics.median(values), 2), "worst": round(max(values), 2), "of": len(values)}
        for name, values in times(done)
    }
    return {"faults": dict(Counter(fault["kind"] for fault in done)), **figures}


def require_marks(done: list[Fault], slack: float = 1.0) -> None:
    """AssertionError if one is missed by more than `slack` times. Back means: a host was there all the time."""
    found = dict(times([fault for fault in done if fault["kind"] != "nodes"]))
    assert max(found.get("noticed_s", [0])) <= slack * NOTICED_S, found
    assert max(found.get("back_s", [0])) <= slack * BACK_S, found
