"""A real mp4 through `mm-sglang serve --max-video-tokens N`: time to first token, and memory beside what was counted.

python -m benchmarks.video [--tokens 245760] [--layers 28] [--only mm_sparse stock]
python -m benchmarks.video --render FOLDER     the mp4s alone, for --videos FOLDER on a machine without PyAV

Qwen2.5-VL-7B's shape with dummy weights, the settings that apply when none are given (their guard finds every head
good), and stock SGLang with FA3 under the same flags. The mp4 goes as a data URL and is decoded, resized, encoded by
the vision tower and prefilled; asked again, its embedding is cached and all is prefilled anew. Another one warms up.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Parser, results_of
from benchmarks.kernels.report import machine
from benchmarks.ttft.child import Memory
from benchmarks.ttft.model import LAYERS, make_model
from benchmarks.ttft.parts import settings
from mm_sglang.demo.client import reply
from mm_sglang.demo.server import Server
from mm_sglang.demo.video import render_video
from mm_sglang.long_video import long_video
from mm_sglang.serve import OVERRIDES, server_command

SIDE = 448  # pixels: 256 tokens a pair of frames, that is a second
A_SECOND = 256
ROOM = 65536  # tokens of a server beside the long video
QUESTION = "What happens in this video?"
STOCK = ("--prefill-attention-backend", "fa3", "--decode-attention-backend", "flashinfer")
CONTESTANTS = ("mm_sparse", "stock")
WARM = 98304  # tokens of the mp4 that warms up: kernels of prompts past 64K compile with it


def make_videos(folder: Path, tokens: int) -> None:
    """Write long.mp4 of `tokens` tokens and warm.mp4 of WARM into the folder."""
    for number, (name, length) in enumerate((("long", tokens), ("warm", WARM))):
        seconds = length / A_SECOND
        facts = render_video(folder / f"{name}.mp4", seconds=seconds, fps=2, width=SIDE, height=SIDE, seed=number)
        print(f"{facts.path}: {facts.seconds:.0f} s, {facts.bytes / 1e6:.1f} MB", flush=True)


def command(who: str, model: Path, tokens: int) -> tuple[list[str], dict[str, str]]:
    """Of a contestant's server; both have the same flags but for the backend's."""
    own = {key: value for key, value in settings("defaults").items() if key != "assume_video"}
    extra = [
        "--load-format", "dummy", "--dtype", "bfloat16", "--cuda-graph-max-bs-decode", "4", "--max-total-tokens",
        str(tokens + ROOM), OVERRIDES, json.dumps({"mm_sparse": own}),
    ]  # fmt: skip
    argv, environment = server_command(
        str(model), config=None, extra=extra, cores=os.cpu_count(), max_video_tokens=tokens
    )
    if who == "stock":
        for flag in ("--attention-backend", OVERRIDES):
            at = argv.index(flag)
            argv = argv[:at] + argv[at + 2 :]
        argv += STOCK
    return argv, environment


def measure(who: str, model: Path, tokens: int, videos: Path, log: Path) -> dict[str, Any]:
    """Start the server, warm it up, ask about the long video twice."""
    argv, environment = command(who, model, tokens)
    began = time.perf_counter()
    with Server(argv, environment, log) as server:
        record: dict[str, Any] = {"name": who, "argv": argv[3:], "start_seconds": time.perf_counter() - began}
        reply(server.url, [("video", videos / "warm.mp4"), ("text", QUESTION)], 2)
        for name in ("first", "again"):
            server.flush_cache()
            with Memory() as memory:
                given = reply(server.url, [("video", videos / "long.mp4"), ("text", QUESTION)], 2)
            record |= {"prompt_tokens": given.prompt_tokens, f"{name}_s": given.first_token_s}
            record[f"{name}_peak_gb"] = memory.peak
    return record


def table(record: dict[str, Any]) -> str:
    needs = record["needs_gb"]
    lines = [
        f"{record['about']['gpu']}, commit {record['about']['commit']}, {record['layers']} layers",
        f"mp4 of {record['tokens'] / A_SECOND:.0f} s, {record['bytes'] / 1e6:.1f} MB, {SIDE} x {SIDE}",
        f"counted: {', '.join(f'{name} {size:.1f} GB' for name, size in needs.items())}",
        f"{'who':10} {'tokens':>8} {'TTFT s':>8} {'again s':>8} {'peak GB':>8} {'again':>6}",
    ]
    for run in record["runs"]:
        if "error" in run:
            lines.append(f"{run['name']:10} {run['error']}")
        else:
            lines.append(
                f"{run['name']:10} {run['prompt_tokens']:8} {run['first_s']:8.2f} {run['again_s']:8.2f} "
                f"{run['first_peak_gb']:8.1f} {run['again_peak_gb']:6.1f}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = Parser("benchmarks.video", __doc__)
    parser.add_argument("--tokens", type=int, default=245760, help="of the video; default: 245760")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of {LAYERS}; default: all")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--render", type=Path, metavar="FOLDER", help="write the mp4s there and measure nothing")
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="mp4s made so; default: renders them")
    parser.add_argument("--logs", type=Path, help="folder for the servers' output; default: a new one")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/video.json")
    options = parser.parse_args()
    if options.tokens < WARM or not 1 <= options.layers <= LAYERS:
        parser.error(f"--tokens {options.tokens} --layers {options.layers}: needs tokens from {WARM}, 1 to {LAYERS}")
    if options.render is not None:
        make_videos(options.render, options.tokens)
        return 0
    if not torch.cuda.is_available():
        parser.error("no CUDA device: this measures on a GPU (--render FOLDER writes its mp4s anywhere)")
    about = machine()
    out = options.out or results_of(about) / "video.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    logs = options.logs or Path(tempfile.mkdtemp())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model(folder / "model", layers=options.layers, positions=options.tokens + ROOM)
        videos = options.videos or folder
        if options.videos is None:
            make_videos(folder, options.tokens)
        needs = long_video(str(model), options.tokens).needs
        record: dict[str, Any] = {
            "about": about, "layers": options.layers, "tokens": options.tokens,
            "bytes": (videos / "long.mp4").stat().st_size,
            "needs_gb": {
                "weights": needs.weights / 1e9, "KV cache": needs.keys_and_values / 1e9,
                "vision cache": needs.embedding / 1e9, "the rest": needs.rest / 1e9, "all": needs.total / 1e9,
            },
            "runs": [],
        }  # fmt: skip
        for who in options.only:
            try:
                run = measure(who, model, options.tokens, videos, logs / f"{who}.log")
            except Exception as error:  # whatever the server or the client says: the other contestant still runs
                run = {"name": who, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            record["runs"].append(run)
            out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    return int(any("error" in run for run in record["runs"]))


if __name__ == "__main__":
    sys.exit(main())
