"""Sparse prefill against dense attention and MInference on this GPU: checks first, then one table and two plots.

python -m benchmarks.kernels                              everything
python -m benchmarks.kernels --quick                      a first look: one shape, 32K, two cases
python -m benchmarks.kernels --shapes qwen3-vl-8b --add   further rows for the same file, same commit and machine
python -m benchmarks.kernels --show FILE                  table and plots again, from a file, without a GPU
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Parser, results_of
from benchmarks.kernels import plots, report
from benchmarks.kernels.cases import CASES, LENGTHS, MIX, PAPER, SHAPES
from benchmarks.kernels.measure import Row
from benchmarks.kernels.session import Options, Session
from mm_sglang.kernels.engines import ENGINES

LAST_SECONDS = 15.0  # kept back for the table and the plots
LEGEND = """
ms: medians. est..merge: device time of each stage. other%: share of the whole that is not attention, gaps included.
dens%: tiles computed of those that dense causal attention computes. TF/s: on tiles computed, partial ones included.
recall: share of the dense softmax's mass attended, mean (least: worst head) over 64 rows a head of the second half.
x best: over the fastest dense kernel. GB: memory beyond inputs and outputs. err: error over SDPA's, worst head.
"""
SAME = ("gpu", "driver", "commit", "versions")


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [case.name for case in CASES]
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS", help="default: 32K 128K 512K 1M"
    )
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="default: all")
    parser.add_argument(
        "--cases", nargs="+", choices=names, default=names, metavar="CASE", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--engine", choices=[n for n in ENGINES if n != "reference"], default="fa4", help="default: fa4"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/kernels.json; plots go beside it")
    parser.add_argument(
        "--budget-seconds", type=float, help="stop in time, and say what was left out. Default: no limit"
    )
    parser.add_argument("--quick", action="store_true", help="first shape, 32K, two cases, fewer checks")
    parser.add_argument("--add", action="store_true", help="keep the rows that --out holds already")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print and plot a stored table, measure nothing")
    options = parser.parse_args(arguments)
    for tokens in options.lengths:
        if tokens < 256:
            parser.error(f"--lengths {tokens}: needs at least 256 tokens")
    if options.budget_seconds is not None and options.budget_seconds <= 2 * LAST_SECONDS:
        parser.error(f"--budget-seconds {options.budget_seconds:g}: needs more than {2 * LAST_SECONDS:g}")
    return options


def show(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Print the table, what it says of the marks, and draw the plots beside `path`."""
    print("\n" + report.table_text(rows))
    print(LEGEND)
    print(report.marks_text(rows))
    if text := report.missing_text(rows, about.get("left_out", ())):
        print("\n" + text)
    print(f"\n{about['gpu']}, driver {about['driver']}, commit {about['commit']}, {about['date']}, {about['versions']}")
    try:
        plots.roofline(path.with_name("kernels-roofline.png"), rows, about)
        plots.speedup(path.with_name("kernels-speedup.png"), rows, about)
    except ImportError as error:
        print(f"no plots: {error}; draw them elsewhere with --show {path.name}")


def earlier(path: Path, about: dict[str, Any]) -> list[Row]:
    """Rows of a file that --add may keep."""
    if not path.exists():
        return []
    held, rows = report.from_json(path)
    other = [name for name in SAME if held.get(name) != about[name]]
    if other:
        raise ValueError(f"--add: {path} has another {', '.join(other)}: needs the same, or another --out")
    return [r for r in rows if r.missing is None]


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = Parser("benchmarks.kernels", __doc__)
    chosen = parse(parser, arguments)
    if chosen.show is not None:
        try:
            about, rows = report.from_json(chosen.show)
        except ValueError as error:
            parser.error(f"--show: {error}")
        show(chosen.show, about, rows)
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures on a GPU (--show FILE prints a stored table anywhere)")
    about = report.machine()
    out = chosen.out or results_of(about) / "kernels.json"
    try:
        if reason := ENGINES[chosen.engine].missing():
            raise ValueError(f"--engine {chosen.engine}: {reason}")
        before = earlier(out, about) if chosen.add else []
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    cases = [case for case in CASES if case.name in chosen.cases]
    session = Session(
        about=about, rows=before,
        options=Options(
            lengths=(LENGTHS[0],) if chosen.quick else tuple(sorted(set(chosen.lengths))),
            shapes=tuple(chosen.shapes[:1] if chosen.quick else chosen.shapes),
            cases=(MIX, PAPER) if chosen.quick else tuple(cases),
            engine=chosen.engine, out=out, quick=chosen.quick, seed=secrets.randbelow(1 << 30),
            budget=None if chosen.budget_seconds is None else chosen.budget_seconds + began - LAST_SECONDS,
        ),
    )  # fmt: skip
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.no_grad():
        failures = [r for r in session.check(device) if r.failure is not None]
        for r in failures:
            where = f"{r.tokens} tokens, prefix {r.prefix}, {r.heads}, seed {r.seed}"
            print(f"check failed: {r.engine}, {r.what}, {where}: {r.failure}")
        print(f"{len(about['checks']) - len(failures)} of {len(about['checks'])} checks passed", flush=True)
        if failures:
            session.store()
            print("nothing was timed: numbers of a wrong kernel are worth nothing", file=sys.stderr)
            return 1
        usable = session.rivals(device)
        about["ceilings"] = report.ceilings()
        session.run(usable, device)
    session.store()
    show(out, {**about, "left_out": session.left_out}, session.rows)
    wrong = [r for r in session.rows if r.error_ratio is not None and r.error_ratio > 2.0]
    return 1 if session.failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
