"""Answers of a trained small model with its prefill attention replaced: sparse methods at one density, and dense.

python -m benchmarks.accuracy FOLDER                             15 methods, six tasks, 4K to 128K, 5 depths, 3 samples
python -m benchmarks.accuracy FOLDER --config searched.yaml      patterns that mm-sglang search has written
python -m benchmarks.accuracy FOLDER --budget-seconds 450        ends in time, search included; the same command goes on
python -m benchmarks.accuracy --show FILE                        table and heat maps of a stored run

Two GPUs, and 256K for some methods; whoever comes first searches in S, the other waits for it:

CUDA_VISIBLE_DEVICES=0 python -m benchmarks.accuracy FOLDER --searched S --out A --tasks v_niah tracking order &
CUDA_VISIBLE_DEVICES=1 python -m benchmarks.accuracy FOLDER --searched S --out B --tasks mm_niah counting caption; wait
python -m benchmarks.accuracy FOLDER --searched S --out C --lengths 262144 --samples 1 --methods searched auto tri_shape
python -m benchmarks.accuracy --merge A B C                      one record, to benchmarks/results/<gpu>/accuracy

Searched patterns come from a training prompt of each task whatever --tasks says (searching.py). The record says which
commands made it, and has the searched settings beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch

from benchmarks.accuracy import searching
from benchmarks.accuracy.merge import merge, write_merged
from benchmarks.accuracy.methods import METHODS, WITHOUT
from benchmarks.accuracy.report import K, heat_maps, table
from benchmarks.accuracy.session import Options, Session
from benchmarks.accuracy.store import RECORD, Store
from benchmarks.accuracy.student import Student, require_prompts
from benchmarks.common import Parser, results_of
from benchmarks.kernels.report import machine
from benchmarks.tiny_model.inputs import Encoder
from benchmarks.tiny_model.tasks import TASKS
from mm_sglang.model_hash import model_hash

LENGTHS = (4 * K, 16 * K, 64 * K, 128 * K)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def main(argv: list[str] | None = None) -> int:
    """Run, print the table, draw; 0 also if --budget-seconds left something out."""
    began = time.monotonic()
    parser = Parser("benchmarks.accuracy", __doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL_FOLDER")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="of mm-sglang search; default: searched here")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--depths", type=float, nargs="+", default=DEPTHS, metavar="SHARE", help="of the needle")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--samples", type=int, default=3, help="a cell (task, length, depth); default: %(default)s")
    parser.add_argument("--density", type=float, default=0.1, help="share of dense tiles; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: benchmarks/results/<gpu>/accuracy")
    parser.add_argument("--searched", type=Path, metavar="DIR", help="where searched settings are; default: --out")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, metavar="S")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print and draw a stored run, measure nothing")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="DIR", help="runs' folders, to one record in --out")
    options = parser.parse_args(argv)
    options.command = shlex.join(["python", "-m", "benchmarks.accuracy", *(sys.argv[1:] if argv is None else argv)])
    try:
        if options.merge is not None:
            record = merge(options.merge)
            out = options.out or results_of(record["about"]) / "accuracy"
            write_merged(options.merge, record, out)
            return _finish(record, out)
        if options.show is not None:
            return _finish(json.loads(options.show.read_text()), options.show.parent)
        return _measure(options, began)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _measure(options: argparse.Namespace, began: float) -> int:
    methods = options.methods or [m for m in METHODS if options.config is None or m not in WITHOUT]
    for ok, message in (
        (options.model is not None, "needs MODEL_FOLDER, --show FILE or --merge DIR"),
        (all(0 <= d <= 1 for d in options.depths), f"--depths {options.depths}: needs shares from 0 to 1"),
        (options.samples >= 1, f"--samples {options.samples}: needs at least 1"),
        (
            options.config is None or not set(methods) & set(WITHOUT),
            f"--methods {', '.join(WITHOUT)}: need no --config",
        ),
    ):
        if not ok:
            raise ValueError(message)
    require_prompts(options.model, options.lengths, options.density)
    device, about = "cuda" if torch.cuda.is_available() else "cpu", machine()
    about["versions"]["transformers"] = importlib.metadata.version("transformers")
    out = options.out or results_of(about) / "accuracy"
    at = " and ".join(f"{n} tokens" for n in searching.searched_at(options.lengths))
    about["searched"] = f"one search on a training prompt of each task at {at}, the nearest serves"
    if options.config is not None:
        about["searched"] = options.config.name
    what = {
        "model": Path(options.model).resolve().name, "model_hash": model_hash(options.model),
        "density": options.density, "samples": options.samples, "config": str(options.config),
    }  # fmt: skip
    store = Store(path=out / RECORD, about=about, what=what, commands=[options.command])
    student = Student(options.model, device)
    session = Session(
        options=Options(
            model=options.model, config=options.config, lengths=tuple(options.lengths), depths=tuple(options.depths),
            tasks=tuple(options.tasks), methods=tuple(dict.fromkeys(["dense", *methods])), samples=options.samples,
            density=options.density, out=out, searched=options.searched or out, budget=options.budget_seconds,
        ),
        student=student, encoder=Encoder(Path(options.model), device), store=store, began=began,
    )  # fmt: skip
    session.run()
    return _finish(json.loads(store.path.read_text()), out)


def _finish(record: dict[str, object], folder: Path) -> int:
    print(table(record))
    for picture in heat_maps(record, folder):
        print(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
