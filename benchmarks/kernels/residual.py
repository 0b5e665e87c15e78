"""What the pooled residual buys: error against dense attention, over time, for growing budgets, with and without it.

python -m benchmarks.kernels.residual            measure, print a table, store JSON and a plot
python -m benchmarks.kernels.residual --show FILE
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import Parser, results_of
from benchmarks.kernels import report, rows
from benchmarks.kernels.cases import SHAPES, Case, K, Recipe
from benchmarks.kernels.measure import HEAD_DIM, Prepared, interleaved
from mm_sglang.kernels.attend.reference import dense_rows
from mm_sglang.kernels.engines import ENGINES

TOKENS, SHAPE = 128 * K, "qwen2.5-vl-7b"
# what is planted: two blocks a query; 64 columns; nothing, so that every key matters a little
SWEEPS: dict[str, tuple[str, list[Recipe]]] = {
    "two planted blocks": ("blocks", [{"pattern": "block_topk", "blocks": n} for n in (3, 4, 8, 16, 32, 64, 128)]),
    "planted columns": (
        "columns", [{"pattern": "vertical_slash", "columns": n, "slashes": 128} for n in (16, 32, 64, 256, 1024, 4096)],
    ),
    "nothing planted": ("random", [{"pattern": "block_topk", "blocks": n} for n in (3, 4, 8, 16, 32, 64, 128)]),
}  # fmt: skip


def sweep(name: str, inputs: str, recipes: list[Recipe], device: torch.device) -> list[dict[str, Any]]:
    """One record a recipe: times (ms, median) and relative errors without and with the residual."""
    out = []
    positions = rows.sample(TOKENS, 0, 64, 0, late=True).to(device)
    want: torch.Tensor | None = None
    for recipe in tqdm(recipes, desc=name, unit="recipe"):
        pair = {}
        for label, values in (("without", recipe), ("with", recipe | {"residual": True})):
            case = Case(name=name, inputs=inputs, recipe=lambda j, n, values=values: values)  # type: ignore[misc]
            pair[label] = Prepared.of(case, TOKENS, SHAPES[SHAPE], ENGINES["fa4"], 0, device)
        it = pair["with"]
        want = dense_rows(it.q, it.k, it.v, positions, HEAD_DIM**-0.5) if want is None else want
        for it in pair.values():
            it.run()  # compiles
        times = interleaved({label: it.run for label, it in pair.items()})
        record: dict[str, Any] = {"inputs": name, "recipe": recipe}
        for label, it in pair.items():
            got = it.run()[0][positions].float()
            record[label] = {
                "ms": statistics.median(times[label]), "error": float((got - want).norm() / want.norm())
            }  # fmt: skip
        out.append(record)
    return out


def text(records: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [f"{'inputs':20} {'budget':>8} {'ms':>8} {'error':>8} | {'ms':>8} {'error':>8} with residual"]
    for r in records:
        budget = r["recipe"].get("blocks") or r["recipe"].get("columns")
        a, b = r["without"], r["with"]
        lines.append(f"{r['inputs']:20} {budget:8} {a['ms']:8.2f} {a['error']:8.4f} | {b['ms']:8.2f} {b['error']:8.4f}")
    return "\n".join(lines)


def plot(path: Path, about: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Error over time, one panel for each kind of input."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["inputs"] for r in records))
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 4.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        own = [r for r in records if r["inputs"] == name]
        for label, style in (("without", "o-"), ("with", "s--")):
            axis.plot([r[label]["ms"] for r in own], [r[label]["error"] for r in own], style, label=f"{label} residual")
        ticks = [n for n in (4, 6, 8, 12, 16, 24, 32, 48, 64) if n < 1.2 * max(r["with"]["ms"] for r in own)]
        axis.set(
            xscale="log", yscale="log", title=name, xlabel="ms, whole operator", ylabel="error against dense, relative"
        )
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(f"{SHAPE}, {TOKENS // K}K tokens, {about['gpu']}, growing budgets from left to right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = Parser("benchmarks.kernels.residual", __doc__)
    parser.add_argument(
        "--out", type=Path, help="default: benchmarks/results/<gpu>/residual.json; the plot goes beside"
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help="print and plot a stored table, measure nothing")
    chosen = parser.parse_args()
    if chosen.show is None:
        if not torch.cuda.is_available():
            parser.error("no CUDA device: this measures on a GPU (--show FILE prints a stored table anywhere)")
        if reason := ENGINES["fa4"].missing():
            parser.error(f"engine fa4: {reason}")
        about, device = report.machine(), torch.device("cuda", torch.cuda.current_device())
        with torch.no_grad():
            records = [r for name, (inputs, recipes) in SWEEPS.items() for r in sweep(name, inputs, recipes, device)]
        path = chosen.out or results_of(about) / "residual.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "tokens": TOKENS, "shape": SHAPE, "records": records}, indent=1))
    else:
        path = chosen.show
        held = json.loads(path.read_text())
        about, records = held["about"], held["records"]
    print(text(records))
    try:
        plot(path.with_suffix(".png"), about, records)
    except ImportError as error:
        print(f"no plot: {error}; draw it elsewhere with --show {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
