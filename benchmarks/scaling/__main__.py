"""Time to first token of one prompt on N GPUs: mm_sparse's context parallelism and what stock SGLang has.

python -m benchmarks.scaling --gpus 1       then 2 and 4, on a machine that has them; the file keeps the others
python -m benchmarks.scaling --show FILE    the table and the picture again, no GPU needed
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Parser, results_of
from benchmarks.kernels.cases import K
from benchmarks.kernels.report import machine
from benchmarks.scaling.parts import specs
from benchmarks.scaling.report import plot, table
from benchmarks.ttft.__main__ import gpus, run
from benchmarks.ttft.model import LAYERS, make_model


def main() -> int:
    parser = Parser("benchmarks.scaling", __doc__)
    parser.add_argument("--gpus", type=int, help="default: all that are visible")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256 * K, 1024 * K], metavar="TOKENS")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of {LAYERS}; default: all")
    parser.add_argument("--minutes", type=float, default=60, help="what would end later is left out; default: 60")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/scaling.json")
    parser.add_argument("--show", type=Path, metavar="FILE", help="table and picture of a stored record")
    options = parser.parse_args()
    if options.show is not None:
        held = json.loads(options.show.read_text())
        print(table(held))
        plot(held, options.show.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures on GPUs (--show FILE prints a stored table anywhere)")
    visible = gpus()
    count = len(visible) if options.gpus is None else options.gpus
    if not 1 <= count <= len(visible):
        parser.error(f"--gpus {count}: this machine shows {len(visible)}")
    if not 1 <= options.layers <= LAYERS:
        parser.error(f"--layers {options.layers}: needs 1 to {LAYERS}")
    about, deadline = machine(), time.time() + options.minutes * 60
    out = options.out or results_of(about) / "scaling.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"about": about, "layers": options.layers, "runs": []}
    if out.exists():
        held = json.loads(out.read_text())
        if held["about"]["commit"] == about["commit"] and held["layers"] == options.layers:
            record["runs"] = [r for r in held["runs"] if r["gpus"] != count]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / f"{options.layers}-layers", layers=options.layers, positions=max(options.lengths) + 8192)
        for spec in specs(count, sorted(options.lengths), options.layers, folder):
            result = run(spec | {"deadline": deadline}, folder, ",".join(visible[:count]))
            record["runs"].append(result | {"gpus": count})
            out.write_text(json.dumps(record, indent=1))
    print(table(record))
    plot(record, out.with_suffix(".png"))
    return 1 if any("error" in r for r in record["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
