"""Time to first token of one prompt on N GPUs: mm_sparse's context parallelism and what stock SGLang has.

python -m benchmarks.scaling --gpus 1       then 2 and 4, on a machine that has them; the file keeps the others
python -m benchmarks.scaling --gpus 4 --only mm_sparse --chunk 131072 --minutes 4    one run, stored as it goes
python -m benchmarks.scaling --show FILE    the table and the picture again, no GPU needed
python -m benchmarks.scaling --predict FILE [--vision S] [--decode S --workers N]     the cost model, no GPU needed
python -m benchmarks.scaling --predict FILE --out TABLE.txt    the same, kept
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.common import Parser, results_of
from benchmarks.kernels.cases import K
from benchmarks.kernels.report import machine
from benchmarks.scaling.model import M, prediction_table
from benchmarks.scaling.parts import CONTESTANTS, ZIGZAG, require_room, specs, text_model
from benchmarks.scaling.record import Run, take_up, with_run
from benchmarks.scaling.report import plot, table
from benchmarks.scaling.text_model import make_text_model
from benchmarks.ttft.__main__ import GRACE, gpus, run
from benchmarks.ttft.model import LAYERS, make_model
from benchmarks.ttft.parts import CHUNK

AROUND = 20  # seconds of a call before its first run and after its last


def main() -> int:
    began = time.time()
    parser = Parser("benchmarks.scaling", __doc__)
    parser.add_argument("--gpus", type=int, help="default: all that are visible")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256 * K, 1024 * K], metavar="TOKENS")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of {LAYERS}; default: all")
    parser.add_argument("--chunk", type=int, default=CHUNK, metavar="TOKENS", help=f"default: {CHUNK}")
    parser.add_argument(
        "--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS,
        help=f"default: all; {ZIGZAG} needs more GPUs than one",
    )  # fmt: skip
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="of the whole call; what would not end by then is left out; default: 60",
    )
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<gpu>/scaling.json; with --predict: the table, as text"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="table and picture of a stored record")
    parser.add_argument(
        "--predict", type=Path, metavar="FILE", help="the cost model beside a record, and for more GPUs"
    )
    per_million = "seconds for 1,048,576 tokens; default: 0, left out"
    parser.add_argument(
        "--vision", type=float, default=0.0, help=f"with --predict: of one GPU's vision tower, {per_million}"
    )
    parser.add_argument("--decode", type=float, default=0.0, help=f"with --predict: of one CPU decoder, {per_million}")
    parser.add_argument("--workers", type=int, default=1, help="with --predict: CPU decoders; default: 1")
    options = parser.parse_args()
    if options.predict is not None:
        held = json.loads(options.predict.read_text())
        try:
            text = prediction_table(held, vision=options.vision / M, decode=options.decode / M, workers=options.workers)
        except ValueError as error:
            parser.error(str(error))
        print(text)
        if options.out is not None:
            options.out.write_text(text + "\n")
        return 0
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
    if count == 1 and options.only == [ZIGZAG]:
        parser.error(f"--only {ZIGZAG}: needs more GPUs than one")
    about = machine()
    deadline = began + options.minutes * 60 - AROUND - GRACE  # a run that is late is ended GRACE after it
    out = options.out or results_of(about) / "scaling.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        todo = specs(count, sorted(options.lengths), options.layers, options.chunk, options.only, folder)
        try:
            for spec in todo:
                require_room(spec, torch.cuda.get_device_properties(0).total_memory)
        except ValueError as error:
            parser.error(str(error))
        record, failed = take_up(out, about, options.layers), False
        size = {"layers": options.layers, "positions": max(options.lengths) + 8192}
        model = make_model(folder / f"{options.layers}-layers", **size)
        make_text_model(text_model(folder, options.layers), model, **size)
        for spec in todo:
            before, facts = record["runs"], {"gpus": count, "lengths": spec["lengths"]}

            def store(result: Run, before: list[Run] = before, facts: Run = facts) -> None:
                record["runs"] = with_run(before, result | facts)
                out.write_text(json.dumps(record, indent=1))

            result = run(spec | {"deadline": deadline}, folder, ",".join(visible[:count]), store)
            store(result)
            failed |= "error" in result
    print(table(record))
    plot(record, out.with_suffix(".png"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
