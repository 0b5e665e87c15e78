"""What it takes to get a video's pixels from SGLang's tokenizer process to a rank, as fp32 and as uint8.

python -m benchmarks.pixels [--frames 256 --side 448 --out FILE.json]

On this machine, as ratios: the processor's patches, the pickle that SGLang sends, what the rank makes of it. The
tower's device normalises the uint8 patches (compat/uint8_pixels.py); here that is the CPU, and its time counts against
us.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.kernels.report import machine
from mm_sglang.compat.uint8_pixels import norm_of, normalised
from mm_sglang.demo.tiny_model import make_tiny_model

REPEATS = 3


def measure(processor: Any, video: torch.Tensor, packed: bool) -> dict[str, float]:
    """Seconds of each stage, the best of REPEATS runs, and the bytes sent."""
    norm, tower = norm_of(processor), SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)
    processor.do_rescale = processor.do_normalize = not packed
    runs = []
    for _ in range(REPEATS):
        times = [time.perf_counter()]
        patches = processor([video], return_tensors="pt", do_resize=False)["pixel_values_videos"]
        times.append(time.perf_counter())
        sent = pickle.dumps(patches, protocol=pickle.HIGHEST_PROTOCOL)
        there = pickle.loads(sent)
        times.append(time.perf_counter())
        made = normalised(there, norm, tower) if packed else there.to(tower.dtype)
        times.append(time.perf_counter())
        runs.append([b - a for a, b in zip(times, times[1:], strict=False)])
    stages = ("processor_s", "pickle_s", "tower_input_s")
    return dict(zip(stages, map(min, zip(*runs, strict=True)), strict=True)) | {
        "bytes": len(sent), "tokens": len(made) // 4
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=256)
    parser.add_argument("--side", type=int, default=448, help="pixels, a multiple of 28")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.frames < 2 or args.side < 28 or args.side % 28:
        parser.error(f"--frames {args.frames} --side {args.side}: needs 2 frames and a multiple of 28 pixels")
    from transformers import AutoProcessor

    with tempfile.TemporaryDirectory() as folder:
        processor = AutoProcessor.from_pretrained(make_tiny_model(Path(folder) / "model")).video_processor
    video = torch.randint(0, 256, (args.frames, 3, args.side, args.side), dtype=torch.uint8)
    found = {name: measure(processor, video, packed) for name, packed in (("fp32", False), ("uint8", True))}
    print(
        f"{args.frames} frames of {args.side} x {args.side}, {found['uint8']['tokens']} tokens, {os.cpu_count()} cores"
    )
    for key in ("bytes", "processor_s", "pickle_s", "tower_input_s"):
        old, new = found["fp32"][key], found["uint8"][key]
        print(f"{key:15} fp32 {old:14.4g}   uint8 {new:14.4g}   {old / new:.2f}x")
    if args.out is not None:
        about = machine() | {"frames": args.frames, "side": args.side}
        args.out.write_text(json.dumps(about | {"runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
