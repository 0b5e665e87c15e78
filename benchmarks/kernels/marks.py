"""The marks of the project's plan for this operator, and what a table of rows reaches of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.kernels.cases import K
from benchmarks.kernels.measure import Row

OURS = "ours"
RATES = {"rate block_topk": 0.90, "paper vertical_slash": 0.90, "rate grid": 0.80, "rate boundary": 0.80}
OVERHEADS = {128 * K: 0.12, 1024 * K: 0.06}
SPEEDUPS = {32 * K: 3.5, 128 * K: 13.0, 512 * K: 25.0, 1024 * K: 28.0}
RECALL = 0.95
GROWTH = 1.3
BREAK_EVEN = 16 * K
ERROR = 2.0
SELECTION = ("estimate", "select", "plan")  # block scores are compared while lists are written, in "plan"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One figure: what it has to be, what it is (None: not measured), and whether that passes."""

    shape: str
    figure: str
    need: str
    got: float | None
    passes: bool
    note: str = ""

    @property
    def verdict(self) -> str:
        return "not measured" if self.got is None else "pass" if self.passes else "SHORT"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


class Table:
    """Rows, to be looked up."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def ours(self, shape: str, tokens: int, case: str) -> Row | None:
        found = [
            r for r in self.rows
            if (r.shape, r.tokens, r.case, r.contestant) == (shape, tokens, case, OURS) and r.ms is not None
        ]  # fmt: skip
        return found[-1] if found else None

    def dense(self, shape: str, tokens: int, name: str | None = None) -> Row | None:
        """The dense rival `name`, or the fastest there is."""
        found = [
            r for r in self.rows
            if (r.shape, r.tokens) == (shape, tokens) and r.contestant.endswith("dense") and r.ms is not None
            and name in (None, r.contestant)
        ]  # fmt: skip
        return min(found, key=lambda r: r.ms or 0.0, default=None)

    def speedup(self, row: Row) -> float | None:
        best = self.dense(row.shape, row.tokens)
        return best.ms / row.ms if best is not None and best.ms and row.ms else None

    def rate(self, row: Row) -> float | None:
        """Our TFLOP/s on the tiles computed, as a share of FA4's dense ones at that shape and length."""
        fa4 = self.dense(row.shape, row.tokens, "FA4 dense")
        return row.tflops / fa4.tflops if fa4 is not None and fa4.tflops and row.tflops else None

    def shapes(self) -> list[str]:
        return list(dict.fromkeys(r.shape for r in self.rows if r.missing is None))


def _at_least(shape: str, figure: str, need: float, got: float | None, note: str = "") -> Mark:
    return Mark(
        shape=shape, figure=figure, need=f">= {need:g}", got=got, passes=got is not None and got >= need, note=note
    )


def _at_most(shape: str, figure: str, need: float, got: float | None, note: str = "") -> Mark:
    return Mark(
        shape=shape, figure=figure, need=f"<= {need:g}", got=got, passes=got is not None and got <= need, note=note
    )


def marks(rows: Sequence[Row]) -> list[Mark]:
    """Every mark for every shape in the rows; what was not measured stays in the list and says so."""
    table, out = Table(rows), []
    for shape in table.shapes():
        for tokens in (128 * K, 1024 * K):
            for case, need in RATES.items():
                row = table.ours(shape, tokens, case)
                got = table.rate(row) if row else None
                out.append(_at_least(shape, f"rate of {case.split()[1]} at {tokens // K}K / FA4 dense", need, got))
        for tokens, need in OVERHEADS.items():
            row = table.ours(shape, tokens, "paper layer")
            out.append(
                _at_most(shape, f"share that is not attention at {tokens // K}K", need, row.overhead if row else None)
            )
        for tokens, need in SPEEDUPS.items():
            row = table.ours(shape, tokens, "mix")
            mark = _at_least(shape, f"mix at {tokens // K}K / best dense", need, table.speedup(row) if row else None)
            if row is not None and (row.recall or 0.0) < RECALL:
                mark = Mark(**asdict(mark) | {"passes": False, "note": f"recall {row.recall or 0.0:.3f} < {RECALL}"})
            out.append(mark)
        out += _growth(table, shape)
        out.append(_break_even(table, shape))
        ratios = [r.error_ratio for r in table.rows if r.shape == shape and r.error_ratio is not None]
        out.append(_at_most(shape, "worst error / SDPA's error", ERROR, max(ratios, default=None)))
    return out


def _growth(table: Table, shape: str) -> list[Mark]:
    def selection(tokens: int) -> float | None:
        row = table.ours(shape, tokens, "mix")
        return sum(row.stages[s] for s in SELECTION) if row is not None and row.stages else None

    base, out = selection(128 * K), []
    for tokens in (512 * K, 1024 * K):
        longer = selection(tokens)
        got = longer / base / (tokens / (128 * K)) if base and longer is not None else None
        out.append(_at_most(shape, f"selection at {tokens // K}K / 128K, over length", GROWTH, got))
    return out


def _break_even(table: Table, shape: str) -> Mark:
    """The shortest length from which on every measured one is faster than dense."""
    got = None
    lengths = sorted({r.tokens for r in table.rows if r.shape == shape and r.case == "mix"}, reverse=True)
    for tokens in lengths:
        row = table.ours(shape, tokens, "mix")
        speedup = table.speedup(row) if row else None
        if speedup is None or speedup <= 1:
            break
        got = float(tokens)
    if lengths and min(lengths) > BREAK_EVEN and got == min(lengths):
        got = None  # shorter ones were not tried
    return _at_most(shape, "shortest length that is faster than dense", BREAK_EVEN, got)
