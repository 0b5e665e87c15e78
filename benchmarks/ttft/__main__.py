"""Time to first token of SGLang on this GPU: stock (fa3) and mm_sparse, the same prompts, one after the other.

python -m benchmarks.ttft                                   4 of 28 layers, 128K to 1M, decode and a mixed load
python -m benchmarks.ttft --layers 28 --only mm_sparse      the whole model, for the contestants that have the time
python -m benchmarks.ttft --show FILE                       the table again, no GPU needed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.kernels.cases import PAPER_GRID, PAPER_SLASH, K, fitted
from benchmarks.kernels.planted import KINDS
from benchmarks.kernels.report import machine
from benchmarks.ttft.model import LAYERS, TEXT, make_model

RESULTS = Path(__file__).resolve().parents[1] / "results"
LENGTHS = (8 * K, 32 * K, 128 * K, 256 * K, 512 * K, 1024 * K)
GROUP = TEXT["num_attention_heads"] // TEXT["num_key_value_heads"]
VIDEO = {"frames": 16, "rows": 14, "cols": 14, "text": 512}  # as benchmarks/kernels/planted.py lays out "mix"
NEEDS = {"128": 2.4, "256": 3.6, "512": 5.8, "1024": 9.0}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"benchmarks.ttft: {message}", file=sys.stderr)
        sys.exit(2)


def settings(kind: str) -> dict[str, Any]:
    """mm_sparse's settings: "mix" is benchmarks/kernels' mix of heads, "paper" MMInference's budgets."""
    recipes = [fitted(name, 0) for name in KINDS[:4]] if kind == "mix" else [PAPER_SLASH, PAPER_GRID] * 2
    heads = {str(head): recipes[head // GROUP] for head in range(TEXT["num_attention_heads"])}
    layers = {str(layer): {"heads": heads} for layer in range(LAYERS)}
    return {"default": {"pattern": "dense"}, "layers": layers, "min_tokens": 16 * K, "assume_video": VIDEO}


def contestants(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Specs for child.py."""
    longest = max(options.lengths)
    common: dict[str, Any] = {
        "model_path": str(model), "load_format": "dummy", "dtype": "bfloat16", "disable_radix_cache": True,
        "context_length": longest + 4096, "max_total_tokens": longest + 65536, "page_size": 1,
        "mem_fraction_static": options.memory, "cuda_graph_max_bs_decode": 16, "max_running_requests": 32,
        "random_seed": 0, "log_level": "warning", "watchdog_timeout": 1200,
    }  # fmt: skip
    out = []
    for name in options.only:
        kind = name.partition(":")[2] or "mix"
        own: dict[str, Any] = {"chunked_prefill_size": options.chunk, "max_prefill_tokens": options.chunk}
        own |= {"enable_mixed_chunk": True} if options.mixed_chunk else {}
        if name == "stock":
            own |= {"prefill_attention_backend": "fa3", "decode_attention_backend": "flashinfer"}
        else:
            values = settings(kind)
            values["layers"] = {k: v for k, v in values["layers"].items() if int(k) < options.layers}
            own |= {
                "attention_backend": "mm_sparse", "json_model_override_args": json.dumps({"mm_sparse": values})
            }  # fmt: skip
        spec = {"name": name, "arguments": common | own, "lengths": list(options.lengths), "repeats": 3}
        spec["repeats_long"] = 1 if name == "stock" else 3  # past 256K; ours compiles a few kernels at its first 1M
        spec["warm_up"] = [4 * K, 32 * K, min(longest, 2 * options.chunk + 128)]
        if not options.brief:
            spec["decode"] = {"tokens": 32 * K, "new": 65}
            mixed = min(longest, 512 * K)
            spec["mixed"] = {"tokens": mixed, "chats": 16, "chat_tokens": 512, "new": 3000}
        out.append(spec)
    return out


def table(record: dict[str, Any]) -> str:
    """What was measured, and the ratio to stock."""
    runs = {r["name"]: r for r in record["runs"]}
    stock = {t["tokens"]: t for t in runs["stock"]["ttft"]} if "stock" in runs else {}
    lines = [f"{record['layers']} of {LAYERS} layers, chunks of {record['chunk'] // K}K, {record['about']['gpu']}"]
    lines.append(f"{'tokens':>8}  {'who':16} {'TTFT s':>9} {'tokens/s':>10} {'over stock':>10} {'peak GB':>8}")
    for run in record["runs"]:
        for t in run["ttft"]:
            base = stock.get(t["tokens"])
            ratio = f"{base['seconds'] / t['seconds']:9.2f}x" if base and run["name"] != "stock" else f"{'-':>10}"
            lines.append(
                f"{t['tokens'] // K:7}K  {run['name']:16} {t['seconds']:9.3f} {t['tokens'] / t['seconds']:10.0f} "
                f"{ratio} {t['peak_gb']:8.1f}"
            )
    for run in record["runs"]:
        for key in ("decode", "mixed", "error"):
            if key in run:
                lines.append(f"{run['name']}: {key}: {run[key]}")
    return "\n".join(lines)


def run(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's record; what it had measured if it fails, with the end of what it said."""
    given, out, log = (folder / f"{spec['name'].replace(':', '-')}.{end}" for end in ("spec.json", "json", "log"))
    given.write_text(json.dumps(spec))
    with log.open("w") as stream:
        code = subprocess.call(
            [sys.executable, "-m", "benchmarks.ttft.child", str(given), str(out)], stderr=stream,
            env=os.environ | {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},
        )  # fmt: skip
    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"name": spec["name"], "ttft": []}
    if code:
        record["error"] = f"exit code {code}"
        print(log.read_text()[-6000:], file=sys.stderr)
    return record


def main() -> int:
    parser = _Parser(prog="python -m benchmarks.ttft", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--layers", type=int, default=4, help=f"of {LAYERS}; default: 4")
    parser.add_argument("--chunk", type=int, default=32 * K, help="chunked prefill size in tokens; default: 32768")
    parser.add_argument(
        "--only", nargs="+", default=["stock", "mm_sparse"], choices=["stock", "mm_sparse", "mm_sparse:paper"]
    )
    parser.add_argument("--memory", type=float, default=0.75, help="--mem-fraction-static; default: 0.75")
    parser.add_argument(
        "--mixed-chunk", action="store_true", help="SGLang's --enable-mixed-chunk: running chats go on beside a prefill"
    )
    parser.add_argument("--brief", action="store_true", help="TTFT only, no decode and no mixed load")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/ttft.json")
    parser.add_argument("--add", action="store_true", help="keep the other contestants that --out holds already")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a stored table, measure nothing")
    options = parser.parse_args()
    if options.show is not None:
        print(table(json.loads(options.show.read_text())))
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures on a GPU (--show FILE prints a stored table anywhere)")
    if not 1 <= options.layers <= LAYERS:
        parser.error(f"--layers {options.layers}: needs 1 to {LAYERS}")
    about = machine()
    out = options.out or RESULTS / about["gpu"].lower().replace(" ", "-") / "ttft.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "about": about,
        "layers": options.layers,
        "chunk": options.chunk,
        "mixed_chunk": options.mixed_chunk,
        "runs": [],
    }
    if options.add and out.exists():
        held = json.loads(out.read_text())
        other = [name for name in ("layers", "chunk", "mixed_chunk") if held.get(name, False) != record[name]]
        other += [name for name in ("gpu", "driver", "commit", "versions") if held["about"][name] != about[name]]
        if other:
            parser.error(f"--add: {out} has another {', '.join(other)}: needs the same, or another --out")
        record["runs"] = [r for r in held["runs"] if r["name"] not in options.only]
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "model", layers=options.layers, positions=max(options.lengths) + 8192)
        for spec in contestants(options, model):
            record["runs"].append(run(spec, Path(scratch)))
            out.write_text(json.dumps(record, indent=1))
            if "error" in record["runs"][-1]:
                break  # what the others would have given has nothing to be compared with
    print(table(record))
    return 1 if any("error" in r for r in record["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main())
