"""The table, the marks beside it, and the JSON file that keeps both."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.marks import OURS, Table, marks
from benchmarks.kernels.measure import Row

PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels", "sglang-kernel", "mm-sglang")
ROOT = Path(__file__).resolve().parents[2]
STAGES = {"estimate": "est", "select": "sel", "permute": "perm", "plan": "plan", "attend": "attend", "merge": "merge"}


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> str:
    """The checkout's commit, with "+changes" where files differ from it; a copy is told its own in MM_SGLANG_COMMIT."""
    told = os.environ.get("MM_SGLANG_COMMIT")
    if told:
        return told
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def machine() -> dict[str, Any]:
    """GPU, driver, versions, commit and date."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions,
    }


def ceilings() -> dict[str, float]:
    """TFLOP/s of a bf16 matrix product of 8192^3 and TB/s of a device copy (bytes read and written), measured now."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    from benchmarks.kernels.measure import interleaved

    times = interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)})
    best = {name: sorted(taken)[len(taken) // 2] for name, taken in times.items()}
    return {"tflops": 2 * 8192**3 / best["product"] / 1e9, "tbps": 2 * source.nbytes / best["copy"] / 1e9}


def to_json(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Everything that was measured, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {**about, "rows": [r.to_dict() for r in rows], "marks": [m.to_dict() for m in marks(rows)]}, indent=1
    )
    part = path.with_suffix(".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def from_json(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What `to_json` wrote.

    Raises:
        ValueError: the file is not such a table.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in held.pop("rows")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: needs a table that this benchmark wrote ({type(error).__name__}: {error})"
        ) from error
    held.pop("marks", None)
    return held, rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def table_text(rows: Sequence[Row]) -> str:
    """One aligned table; times in ms, tiles in thousands, rates in TFLOP/s, percentages where the head says so."""
    table = Table(rows)
    head = [
        "shape", "tokens", "case", "who", "ms", *STAGES.values(), "other%", "ktiles", "dens%", "part%", "TF/s",
        "%FA4", "recall", "least", "x best", "GB", "err",
    ]  # fmt: skip
    lines = [head]
    measured = [row for row in rows if row.missing is None]
    for row in sorted(measured, key=lambda r: (table.shapes().index(r.shape), r.tokens)):
        case = row.case if row.contestant == OURS else "-"
        ktiles = None if row.tiles is None else row.tiles / 1e3
        lines.append([
            row.shape, f"{row.tokens / 1024:.4g}K", case, row.contestant,
            _number(row.ms, ".3f" if (row.ms or 0) < 100 else ".1f"),
            *(_number(row.stages.get(s), ".3f") for s in STAGES), _percent(row.overhead),
            _number(ktiles, ".1f"), _percent(row.density), _percent(row.partial),
            _number(row.tflops, ".0f"), _percent(table.rate(row)), _number(row.recall, ".3f"),
            _number(row.worst_recall, ".3f"), _number(table.speedup(row), ".2f"), _number(row.extra_gb, ".2f"),
            _number(row.error_ratio, ".2f"),
        ])  # fmt: skip
    return aligned(lines, left=(0, 2, 3))


def marks_text(rows: Sequence[Row]) -> str:
    lines = [["shape", "figure", "need", "got", "", ""]]
    lines += [[m.shape, m.figure, m.need, _number(m.got, ".4g"), m.verdict, m.note] for m in marks(rows)]
    return aligned(lines, left=(0, 1, 4, 5))


def missing_text(rows: Sequence[Row], left_out: Iterable[str]) -> str:
    """Who could not be measured and why, and what there was no time for."""
    lines = list(dict.fromkeys(
        f"not measured: {r.contestant} for {r.shape} at {r.tokens / 1024:.4g}K ({r.case}): {r.missing}" if r.tokens else
        f"not measured: {r.contestant}: {r.missing}"
        for r in rows if r.missing is not None
    ))  # fmt: skip
    return "\n".join([*lines, *(f"left out, no time: {what}" for what in left_out)])


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    out = []
    for line in lines:
        cells = [
            cell.ljust(w) if c in left else cell.rjust(w) for c, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)
