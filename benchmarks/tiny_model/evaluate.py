"""Dense accuracy of a model folder: python -m benchmarks.tiny_model.evaluate FOLDER --lengths 4096 131072 --samples 8

Teacher-forced: an answer is right when the most likely token is right at each of its tokens and at the mark that ends
it, which is when greedy decoding gives it. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.tiny_model.batches import at_once, plan_batch
from benchmarks.tiny_model.forward import answer_logits, exact, use_fast_attention
from benchmarks.tiny_model.inputs import Encoder
from benchmarks.tiny_model.tasks import TASKS
from mm_sglang.settings_file import write_whole

TEST_SEED = 1 << 46


def load(folder: Path, device: str) -> Any:
    """The model in its own dtype, with the fast forward pass."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    use_fast_attention(model)
    return model


@torch.no_grad()
def accuracy(
    model: Any, encoder: Encoder, task: str, length: int, depth: float, samples: int, *, photographs: bool = True
) -> float:
    """Share of `samples` test prompts with one question each that the model answers exactly."""
    right = []
    together = at_once(samples, length)
    for first in range(0, samples, together):
        count = min(together, samples - first)
        seed = TEST_SEED + (round(depth * 1000) * 1000 + first) * 1000
        batch = plan_batch(encoder.text, task, length, count, seed=seed, split="test", turns=1, depth=depth)
        tensors = batch.to_model(encoder, photographs=photographs)
        right.append(exact(answer_logits(model, tensors), tensors, batch.turns))
    return torch.cat(right).mean().item()


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One heat map a task: depth down, length across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = sorted({row["task"] for row in rows}, key=TASKS.index)
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    across, down = min(3, len(tasks)), -(-len(tasks) // 3)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 4 * down), squeeze=False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        found = {(row["depth"], row["length"]): row["exact"] for row in rows if row["task"] == task}
        table = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        axis.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{length / 1024:g}K" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axis.set_title(task)
        for y, values in enumerate(table):
            for x, value in enumerate(values):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7)
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536, 131072])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--out", type=Path, default=Path("tiny_model_accuracy"), help="without ending")
    parser.add_argument("--textures", action="store_true", help="no photographs as backgrounds")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, encoder = load(args.folder, device), Encoder(args.folder, device)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    settings = {key: str(value) for key, value in vars(args).items()}
    rows: list[dict[str, Any]] = []
    cases = [(n, task, depth) for n in args.lengths for task in args.tasks for depth in args.depths]
    for length, task, depth in tqdm(cases, mininterval=5):
        begun = time.monotonic()
        got = accuracy(model, encoder, task, length, depth, args.samples, photographs=not args.textures)
        rows.append({"task": task, "length": length, "depth": depth, "samples": args.samples, "exact": got,
                     "seconds": round(time.monotonic() - begun, 3)})  # fmt: skip
        result = {"machine": machine, "torch": torch.__version__, "settings": settings, "rows": rows}
        write_whole(args.out.with_suffix(".json"), json.dumps(result, indent=1))  # each, as a run may be cut short
    draw(rows, args.out.with_suffix(".png"))
    for task in args.tasks:
        means = {
            length: [row["exact"] for row in rows if (row["task"], row["length"]) == (task, length)]
            for length in args.lengths
        }
        print(f"{task:9s}", "  ".join(f"{n}: {sum(got) / len(got):.3f}" for n, got in means.items()))


if __name__ == "__main__":
    main()
