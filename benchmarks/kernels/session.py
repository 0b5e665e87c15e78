"""One run of the benchmark: checks, then rows in the order of what they tell, stored as they come."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.kernels import minference, report
from benchmarks.kernels.cases import MIX, PAPER_SLASH_ONLY, SHAPES, SHORT_LENGTHS, Case
from benchmarks.kernels.checks import Result, check_all
from benchmarks.kernels.marks import OURS
from benchmarks.kernels.measure import (
    HEAD_DIM,
    Call,
    Clock,
    Prepared,
    Row,
    causal_flops,
    first_line,
    interleaved,
    measure,
    rival_row,
)
from benchmarks.kernels.rivals import RIVALS, Rival, check
from mm_sglang.kernels.engines import ENGINES, Engine

INDEX_LIMIT = 1 << 31  # elements: past it, kernels that index in int32 may take the device down, so they come last
SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to run; see __main__."""

    lengths: tuple[int, ...]
    shapes: tuple[str, ...]
    cases: tuple[Case, ...]
    engine: str
    out: Path
    budget: float | None
    quick: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One case at one length and shape; `rivals` take turns with ours there."""

    shape: str
    tokens: int
    case: Case | None  # None: rivals alone
    rivals: tuple[Rival, ...] = ()
    stages: bool = True

    def __str__(self) -> str:
        who = self.case.name if self.case is not None else " ".join(r.name for r in self.rivals)
        return f"{self.shape} {self.tokens / 1024:.4g}K {who}"


@dataclass(kw_only=True)
class Session:
    """State of a run; `finish` may be called at any time."""

    options: Options
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: bool = False

    @property
    def engine(self) -> Engine:
        return ENGINES[self.options.engine]

    def check(self, device: torch.device) -> list[Result]:
        """Results of all checks; engines other than the one to be timed are checked too where they can run."""
        engines = []
        for engine in ENGINES.values():
            try:
                reason = engine.missing()
            except Exception as error:
                reason = first_line(error)
            if engine.name != "reference" and reason is None:
                engines.append(engine)
            elif engine.name != "reference":
                self._missing(f"engine {engine.name}", reason)
        results = check_all(engines, device, self.options.seed, self.options.quick)
        self.about["checks"] = [r.to_dict() for r in results]
        return results

    def _missing(self, who: str, reason: str | None, shape: str = "-", tokens: int = 0, case: str = "-") -> None:
        self.rows.append(Row(shape=shape, tokens=tokens, case=case, contestant=who, missing=reason))

    def rivals(self, device: torch.device) -> tuple[Rival, ...]:
        """Those that run here and are right on a small input; the others become rows that say why not."""
        usable = []
        for rival in tqdm(RIVALS, desc="rivals", unit="rival"):
            reason = rival.probe() or check(rival, device)
            if reason is None:
                usable.append(rival)
            else:
                self._missing(rival.name, reason)
        self.about["rivals"] = {r.name: f"{r.package} {r.version()}" for r in usable}
        return tuple(usable)

    def steps(self, usable: tuple[Rival, ...]) -> Iterator[Step]:
        """Short lengths, then the table, then rivals that might not survive the length."""
        dense, sparse = (tuple(r for r in usable if r.dense is kind) for kind in (True, False))
        last = []
        for shape in self.options.shapes:
            if MIX in self.options.cases and not self.options.quick:
                for tokens in sorted(set(SHORT_LENGTHS) - set(self.options.lengths)):
                    yield Step(shape=shape, tokens=tokens, case=MIX, rivals=dense, stages=False)
            for tokens in self.options.lengths:
                risky = tokens * SHAPES[shape][0] * HEAD_DIM >= INDEX_LIMIT
                safe = tuple(r for r in dense if not risky or r.name == "FA4 dense")
                cases = [c for c in self.options.cases if c.lengths is None or tokens in c.lengths]
                for number, case in enumerate(cases):
                    beside = safe if number == 0 else ()
                    if case is PAPER_SLASH_ONLY and not risky:
                        beside += sparse
                    yield Step(shape=shape, tokens=tokens, case=case, rivals=beside)
                if risky:
                    last += [
                        Step(shape=shape, tokens=tokens, case=None, rivals=(r,))
                        for r in (*dense, *sparse)
                        if r not in safe
                    ]
        yield from last

    def run(self, usable: tuple[Rival, ...], device: torch.device) -> None:
        clock = Clock(self.options.budget and self.options.budget - time.monotonic())
        steps = list(self.steps(usable))
        for number, step in enumerate(bar := tqdm(steps, desc="measuring", unit="row")):
            bar.set_postfix_str(str(step))
            rivals_cost = sum(_seconds(step) for r in step.rivals if r.dense)
            if not clock.allows(step.tokens, rivals_cost):
                self.left_out.append(str(step))
                continue
            began = time.monotonic()
            try:
                self._step(step, device)
            except Exception as error:
                self.failed |= step.case is not None
                who = OURS if step.case is not None else step.rivals[0].name
                self._missing(who, first_line(error), step.shape, step.tokens, step.case.name if step.case else who)
                if not _alive():
                    self.left_out += [f"{s} (the device failed in {step})" for s in steps[number + 1 :]]
                    break
            gc.collect()
            torch.cuda.empty_cache()
            if step.case is not None:
                clock.took(step.tokens, time.monotonic() - began - rivals_cost / 2)
            self.store()

    def _step(self, step: Step, device: torch.device) -> None:
        heads = SHAPES[step.shape]
        it = Prepared.of(step.case or PAPER_SLASH_ONLY, step.tokens, heads, self.engine, 0, device)
        calls, failures = _guarded(step, it)
        row = None
        if step.case is None:
            times = interleaved(calls) if calls else {}
        else:
            row = Row(
                shape=step.shape, tokens=step.tokens, case=step.case.name, contestant=OURS, inputs=step.case.inputs,
                note=step.case.note,
            )  # fmt: skip
            times = measure(row, it, calls, self.options.seed, step.stages)
            self.rows.append(row)
        for rival in step.rivals:
            if rival.name in failures:
                self._missing(rival.name, failures[rival.name], step.shape, step.tokens, rival.name)
            else:
                self._rival(step, rival, times[rival.name], heads[0])

    def _rival(self, step: Step, rival: Rival, times: list[float], heads: int) -> None:
        if rival.dense:
            row = rival_row(step.shape, step.tokens, rival.name, times, causal_flops(step.tokens, heads))
        else:
            count = minference.heads_run(step.tokens, heads)
            note = "" if count == heads else f"{count} of {heads} heads run, time scaled"
            times = [t * heads / count for t in times]
            row = rival_row(step.shape, step.tokens, rival.name, times, None, note)
        self.rows.append(row)

    def store(self) -> None:
        report.to_json(self.options.out, {**self.about, "left_out": self.left_out}, self.rows)


def _seconds(step: Step) -> float:
    """A careful guess of what one dense rival takes in all."""
    once = causal_flops(step.tokens, SHAPES[step.shape][0]) / 5e14
    return once * (1 if once > 5 else 2 if once > 1 else 8)


def _guarded(step: Step, it: Prepared) -> tuple[dict[str, Call], dict[str, str]]:
    """The step's rivals as calls that don't raise, and, filled as they run, why those that failed did."""
    calls: dict[str, Call] = {}
    failures: dict[str, str] = {}

    def call(rival: Rival, prepared: Any) -> torch.Tensor | None:
        try:
            return None if rival.name in failures else rival.run(prepared, SCALE)
        except Exception as error:
            failures[rival.name] = first_line(error)
            return None

    few = slice(0, min(len(it.q), 4096))
    for rival in step.rivals:
        try:
            # head counts are compiled in: 4096 tokens warm up cheaply what takes 15 s a call at 1M
            rival.run(rival.prepare(*(x[few].contiguous() for x in (it.q, it.k, it.v))), SCALE)
            calls[rival.name] = partial(call, rival, rival.prepare(it.q, it.k, it.v))
        except Exception as error:
            failures[rival.name] = first_line(error)
    return calls, failures


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
