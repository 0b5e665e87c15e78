"""The most attention that any choice of tiles could hold at a density: what recall of a method is to be judged by.

python -m benchmarks.accuracy.ceiling FOLDER --lengths 16384 131072 --tasks v_niah order     FOLDER of a trained model

A layer's dense softmax is computed exactly at a few tiles of queries, evenly spread. Of their tiles of 128 x 128, the
heaviest of all heads together are taken until the density is reached ("tiles"): nothing that computes whole tiles of a
prompt in its own order can hold more. "keys": the same with the heaviest keys of each query, as if no tile had to be
shared. What block_topk can reach: "equal", the same number of tiles for every tile of queries, the first and the two
nearest among them, the others the heaviest; and by each of its scores, the others of best score.

Legend: N tokens, H and Hkv heads, D head dimension.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from bisect import bisect_right
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
from mm_sglang.choice import choose_engine
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import BlockTopK
from mm_sglang.kernels.patterns.block_topk import SCORES
from mm_sglang.kernels.plan import TILE, evenly
from mm_sglang.kernels.prefill import make_plan
from mm_sglang.kernels.select.blocks_reference import scores
from mm_sglang.model_hash import model_hash
from mm_sglang.settings_file import write_whole

TILES = 32  # of queries, a prompt's; 4,096 of them
SINK, LOCAL = BlockTopK.sink // TILE, BlockTopK.local // TILE  # tiles, as the search and `auto` have them


def ceilings(q: torch.Tensor, k: torch.Tensor, scale: float, density: float, tiles: int = TILES) -> dict[str, float]:
    """By name (see the module's text), the mean share of the dense softmax held at this density, over a layer's heads.

    Args:
        q: [N, H, D]; k: [N, Hkv, D], a whole prompt's; density: share of causal tiles, and of each query's keys.
    """
    length, heads, share = len(q), q.shape[1], q.shape[1] // k.shape[1]
    number = -(-length // TILE)
    position = torch.arange(length, device=q.device)
    sampled = evenly(number, tiles)
    mass, rows, by_keys = [], 0, 0.0  # mass: of a tile of queries, [H, its causal tiles]
    for tile in sampled:
        first, last = tile * TILE, min((tile + 1) * TILE, length)
        own = position[first:last]
        rows += last - first
        mass.append(torch.empty(heads, tile + 1, device=q.device))
        for head in range(heads):
            logits = q[first:last, head].float() @ k[:last, head // share].float().T * scale
            weight = logits.masked_fill_(position[:last] > own[:, None], -torch.inf).softmax(1)
            whole = torch.nn.functional.pad(weight, (0, -last % TILE))
            mass[-1][head] = whole.view(last - first, -1, TILE).sum((0, 2))
            kept = ((own + 1).double() * density - 1e-9).ceil()[:, None]
            most = math.ceil(last * density)
            heaviest = weight.topk(most).values * (torch.arange(most, device=q.device) < kept)
            by_keys += float(heaviest.sum())
    every = torch.cat([each.flatten() for each in mass])  # causal tiles of all heads
    best = every.topk(max(1, int(density * len(every)))).values.sum()
    orders = {"equal": mass} | {name: _scores(q, k, scale, name, sampled) for name in SCORES}
    held = {"tiles": float(best), "keys": by_keys} | {n: _held(mass, order, density) for n, order in orders.items()}
    return {name: value / (rows * heads) for name, value in held.items()}


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, name: str, sampled: tuple[int, ...]) -> list[torch.Tensor]:
    """block_topk's, [H, causal tiles] for each of these tiles of queries."""
    pattern = BlockTopK(sink=0, local=1, score=name)
    layout = TokenLayout(items=(), length=len(q), device=q.device)
    ops = choose_engine("auto", q.device.type).ops()
    plan = make_plan(q, k, layout=layout, patterns=[pattern] * q.shape[1], scale=scale, ops=ops)
    (group,) = plan.groups
    (segment,) = group.segments
    assert segment.blocks is not None and group.members == list(range(q.shape[1]))
    number = torch.arange(segment.blocks.k.shape[1], device=q.device)
    return [
        scores(segment.blocks, tile, tile + 1, (number <= tile).expand(q.shape[1], 1, -1))[:, 0, : tile + 1]
        for tile in sampled
    ]


def _held(mass: list[torch.Tensor], order: list[torch.Tensor], density: float) -> float:
    """Mass of the first tiles in this order; between two numbers of tiles, of which one is too few, in proportion."""
    total = sum(each.shape[1] for each in mass)
    ranked = []
    for each, by in zip(mass, order, strict=True):
        forced = torch.zeros(each.shape[1], dtype=torch.bool, device=each.device)
        forced[:SINK], forced[-LOCAL:] = True, True
        ranked.append(each.gather(1, by.masked_fill(forced, torch.inf).argsort(1, descending=True)))

    def at(most: int) -> tuple[float, float]:
        """Density, and mass."""
        own = [each[:, :most] for each in ranked]
        return sum(each.shape[1] for each in own) / total, sum(float(each.sum()) for each in own)

    widest = max(each.shape[1] for each in mass)
    few = bisect_right(range(widest + 1), density, key=lambda most: at(most)[0]) - 1
    (low, held), (high, more) = at(few), at(few + 1)
    return held + (more - held) * min(1.0, max(0.0, density - low) / max(high - low, 1e-9))


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
        found: list[dict[str, float]] = []

        def look(
            _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
            found: list[dict[str, float]] = found,
        ) -> None:  # fmt: skip
            found.append(ceilings(q, k, scale, options.density))

        student.held.run(student.prepare(encoder(sample, answers=True)).question()[0], look)
        mean = {name: sum(layer[name] for layer in found) / len(found) for name in found[0]}
        rows.append({"task": task, "length": length, **mean, "layers": found})
        figures = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
        tqdm.write(f"{task:9} {length:7} tokens: {figures}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
