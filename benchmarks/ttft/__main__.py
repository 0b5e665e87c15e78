"""Time to first token of SGLang on this machine's GPUs: stock (fa3) and mm_sparse, the same prompts.

python -m benchmarks.ttft                          everything; a run at a time on each GPU that is visible
python -m benchmarks.ttft --parts ttft mixed       only these tables
python -m benchmarks.ttft --show FILE              the tables and the picture again, no GPU needed
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import Parser, results_of
from benchmarks.kernels.cases import K
from benchmarks.kernels.report import machine
from benchmarks.ttft import plots, profile
from benchmarks.ttft.model import LAYERS, make_model
from benchmarks.ttft.parts import PARTS, specs

START = 75  # seconds until SGLang answers with 28 layers; 64 were measured
GRACE = 60  # seconds after its deadline that a run may end by itself


def table(record: dict[str, Any]) -> str:
    """What was measured, part by part, and the ratio to stock of the same part, layers and length."""
    lines = [f"{record['about']['gpu']}, commit {record['about']['commit']}"]
    for part, what in PARTS.items():
        runs = [run for run in record["runs"] if run["part"] == part]
        if not runs:
            continue
        best: dict[int, float] = {}  # stock at its best chunk size
        for run in runs:
            for t in run["ttft"] if run["name"] == "stock" else ():
                best[t["tokens"]] = min(t["seconds"], best.get(t["tokens"], t["seconds"]))
        lines += ["", f"{part}: {what}"]
        lines.append(f"{'tokens':>8}  {'who':16} {'chunk':>6} {'TTFT s':>9} {'tokens/s':>10} {'by':>8} {'peak GB':>8}")
        for run in sorted(runs, key=lambda r: (r["name"], r["chunk"])):
            for t in run["ttft"]:
                base = best.get(t["tokens"])
                ratio = f"{base / t['seconds']:7.2f}x" if base and run["name"] != "stock" else f"{'-':>8}"
                lines.append(
                    f"{t['tokens'] // K:7}K  {run['name']:16} {run['chunk'] // K:5}K {t['seconds']:9.3f} "
                    f"{t['tokens'] / t['seconds']:10.0f} {ratio} {t['peak_gb']:8.1f}"
                )
        for run in runs:
            for key in ("decode", "mixed", "questions", "left_out", "error"):
                if run.get(key):
                    lines.append(f"{run['name']}: {key}: {run[key]}")
            if "profile" in run:
                lines.append(f"{run['name']}: GPU time of {run['profile']['tokens'] // K}K by stage")
                lines += profile.lines(run["profile"])
    return "\n".join(lines)


def run(
    spec: dict[str, Any], folder: Path, gpu: str, seen: Callable[[dict[str, Any]], None] = lambda record: None
) -> dict[str, Any]:
    """The child's record; what it had measured if it fails or runs out of time, with the end of what it said.

    seen: is given the record each time there is more in it.
    """
    about = {key: spec[key] for key in ("part", "name", "layers", "chunk", "mixed_chunk")}
    stem = f"{spec['part']}-{spec['name'].replace(':', '-')}-{spec['chunk']}"
    given, out, log = (folder / f"{stem}.{end}" for end in ("spec.json", "json", "log"))
    if time.time() + START > spec["deadline"]:
        return about | {"ttft": [], "left_out": ["everything: no time to start SGLang"]}
    given.write_text(json.dumps(spec))
    last, late = "", False
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ttft.child", str(given), str(out)], stderr=stream,
            env=os.environ | {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1", "CUDA_VISIBLE_DEVICES": gpu},
        )  # fmt: skip
        while child.poll() is None:
            time.sleep(0.5)
            if out.exists() and (text := out.read_text()) != last:
                last = text
                seen(about | json.loads(text))
            if time.time() > spec["deadline"] + GRACE:
                late = True
                child.kill()  # SGLang's processes end with their parent
    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"ttft": []}
    if late or child.returncode:
        record["error"] = f"ended {GRACE} s after its time" if late else f"exit code {child.returncode}"
        print(f"{stem}:\n{log.read_text()[-6000:]}", file=sys.stderr)
    return about | record


def gpus() -> list[str]:
    """The numbers of the GPUs to use, as CUDA_VISIBLE_DEVICES wants them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]


def main() -> int:
    parser = Parser("benchmarks.ttft", __doc__)
    parts = "; ".join(f"{name}: {what}" for name, what in PARTS.items())
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), help=f"{parts}; default: all")
    parser.add_argument("--longest", type=int, default=1024 * K, metavar="TOKENS", help="default: 1048576")
    parser.add_argument(
        "--only", nargs="+", default=["stock", "mm_sparse"], choices=["stock", "mm_sparse", "mm_sparse:paper"]
    )
    parser.add_argument("--minutes", type=float, default=60, help="what would end later is left out; default: 60")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/ttft.json")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="tables and picture of a stored record, measure nothing"
    )
    options = parser.parse_args()
    if options.show is not None:
        held = json.loads(options.show.read_text())
        print(table(held))
        plots.plot(held, options.show.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures on a GPU (--show FILE prints a stored table anywhere)")
    deadline = time.time() + options.minutes * 60
    about = machine()
    out = options.out or results_of(about) / "ttft.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"about": about, "gpus": len(gpus()), "runs": []}
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpu in gpus():
        free.put(gpu)
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(gpus())) as pool:
        folder = Path(scratch)
        for layers in (4, LAYERS):
            make_model(folder / f"{layers}-layers", layers=layers, positions=options.longest + 8192)
        todo = specs(options.parts, options.longest, folder, options.only)

        def one(spec: dict[str, Any]) -> dict[str, Any]:
            gpu = free.get()
            try:
                return run(spec | {"deadline": deadline}, folder, gpu)
            finally:
                free.put(gpu)

        for result in tqdm(pool.map(one, todo), total=len(todo), desc="runs", unit="run"):
            record["runs"].append(result)
            out.write_text(json.dumps(record, indent=1))
    print(table(record))
    plots.plot(record, out.with_suffix(".png"))
    return 1 if any("error" in r for r in record["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
