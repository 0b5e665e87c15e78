"""The most attention that any choice of tiles could hold at a density: what recall of a method is to be judged by.

python -m benchmarks.accuracy.ceiling FOLDER --lengths 16384 131072 --tasks v_niah order     FOLDER of a trained model

A layer's dense softmax is computed exactly at a few tiles of queries, evenly spread. Of their tiles of 128 x 128, the
heaviest of all heads together are taken until the density is reached: nothing that computes whole tiles of a prompt in
its own order can hold more. "keys": the same with the heaviest keys of each query, as if no tile had to be shared.

Legend: N tokens, H and Hkv heads, D head dimension.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.searching import SEED
from benchmarks.accuracy.student import Student, require_prompts
from benchmarks.common import Parser, results_of
from benchmarks.kernels.report import machine
from benchmarks.tiny_model.inputs import Encoder
from benchmarks.tiny_model.tasks import TASKS, make_sample
from mm_sglang.kernels.plan import TILE, evenly
from mm_sglang.model_hash import model_hash
from mm_sglang.settings_file import write_whole

TILES = 32  # of queries, a prompt's; 4,096 of them


def ceilings(q: torch.Tensor, k: torch.Tensor, scale: float, density: float, tiles: int = TILES) -> tuple[float, float]:
    """(by tiles, by keys): the greatest mean share of the dense softmax at this density, over all heads of a layer.

    Args:
        q: [N, H, D]; k: [N, Hkv, D], a whole prompt's; density: share of causal tiles, and of each query's keys.
    """
    length, heads, share = len(q), q.shape[1], q.shape[1] // k.shape[1]
    number = -(-length // TILE)
    position = torch.arange(length, device=q.device)
    mass, rows, by_keys = [], 0, 0.0
    for tile in evenly(number, tiles):
        first, last = tile * TILE, min((tile + 1) * TILE, length)
        own = position[first:last]
        rows += last - first
        for head in range(heads):
            logits = q[first:last, head].float() @ k[:last, head // share].float().T * scale
            weight = logits.masked_fill_(position[:last] > own[:, None], -torch.inf).softmax(1)
            whole = torch.nn.functional.pad(weight, (0, -last % TILE))
            mass.append(whole.view(last - first, -1, TILE).sum((0, 2)))
            kept = ((own + 1).double() * density - 1e-9).ceil()[:, None]
            most = math.ceil(last * density)
            heaviest = weight.topk(most).values * (torch.arange(most, device=q.device) < kept)
            by_keys += float(heaviest.sum())
    every = torch.cat(mass)  # causal tiles of all heads
    best = every.topk(max(1, int(density * len(every)))).values.sum()
    return float(best) / (rows * heads), by_keys / (rows * heads)


def main(argv: list[str] | None = None) -> int:
    """Print and store the table."""
    parser = Parser("benchmarks.accuracy.ceiling", __doc__)
    parser.add_argument("model", metavar="MODEL_FOLDER")
    parser.add_argument("--lengths", type=int, nargs="+", default=(16384,), metavar="TOKENS")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--density", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/<gpu>/ceiling.json")
    options = parser.parse_args(argv)
    try:
        require_prompts(options.model, options.lengths, options.density)
    except ValueError as error:
        parser.error(str(error))
    device, about = "cuda" if torch.cuda.is_available() else "cpu", machine()
    rows = _measure(options, device)
    out = options.out or results_of(about) / "ceiling.json"
    what = {"model_hash": model_hash(options.model), "density": options.density, "query_tiles": TILES}
    write_whole(out, json.dumps({"about": about, "what": what, "rows": rows}, indent=1))
    return 0


def _measure(options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    student, encoder, rows = Student(options.model, device), Encoder(Path(options.model), device), []
    work = [(length, task) for length in options.lengths for task in options.tasks]
    for length, task in tqdm(work, desc="ceiling", unit="prompt"):
        sample = make_sample(task, tokens=length, seed=SEED, split="test", depth=0.5, device=device)
        found: list[tuple[float, float]] = []

        def look(
            _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
            found: list[tuple[float, float]] = found,
        ) -> None:  # fmt: skip
            found.append(ceilings(q, k, scale, options.density))

        student.held.run(student.prepare(encoder(sample, answers=True)).question()[0], look)
        tiles, keys = (sum(own) / len(found) for own in zip(*found, strict=True))
        rows.append({"task": task, "length": length, "tiles": tiles, "keys": keys, "layers": found})
        tqdm.write(f"{task:9} {length:7} tokens: at most {tiles:.3f} by tiles, {keys:.3f} by each query's own keys")
    return rows


if __name__ == "__main__":
    sys.exit(main())
