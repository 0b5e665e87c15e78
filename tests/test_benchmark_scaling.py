"""benchmarks.scaling without a GPU: what it would run, the table and the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling.parts import specs
from benchmarks.scaling.report import balances, plot, table


def record() -> dict[str, Any]:
    def run(gpus: int, name: str, seconds: float, **more: Any) -> dict[str, Any]:
        return {"gpus": gpus, "name": name, "ttft": [{"tokens": 1 << 20, "seconds": seconds, "peak_gb": 90.0}], **more}

    ranks = [{"stages": {"attention": 2.0, "exchange between GPUs": 0.1}}, {"stages": {"attention": 1.0}}]
    profile = {
        "tokens": 1 << 20, "ranks": ranks, "stages": ranks[0]["stages"], "exposed_exchange": 0.05,
        "timeline": [["7", 0.0, 2.0, "attention"], ["20", 0.5, 1.0, "exchange between GPUs"]],
    }  # fmt: skip
    runs = [run(1, "mm_sparse", 24.0), run(2, "mm_sparse", 15.0, profile=profile), run(2, "stock", 180.0)]
    return {"about": {"gpu": "NVIDIA H200", "commit": "abc"}, "layers": 28, "runs": runs}


def test_ranks_get_one_prompt_together(tmp_path: Path) -> None:
    (one, stock), (ours, tensor) = (specs(gpus, [1 << 18, 1 << 20], 28, tmp_path) for gpus in (1, 4))
    assert "attn_cp_size" not in one["arguments"] and "tp_size" not in stock["arguments"]
    assert ours["arguments"]["attn_cp_size"] == ours["arguments"]["tp_size"] == tensor["arguments"]["tp_size"] == 4
    assert ours["arguments"]["enable_prefill_cp"] and "attn_cp_size" not in tensor["arguments"]
    assert ours["lengths"] == tensor["lengths"] and ours["profile"] == 1 << 20


def test_the_table_says_efficiency_ratio_and_balance(tmp_path: Path) -> None:
    text = table(record())
    row = next(line for line in text.splitlines() if line.startswith("   2  mm_sparse"))
    assert row.split() == ["2", "mm_sparse", "1024K", "15.000", "0.80", "12.00x", "90.0"]
    stage, slowest, over_mean = balances(record()["runs"][1]["profile"])[0]
    assert (stage, slowest) == ("attention", 2.0) and over_mean == pytest.approx(2 / 1.5)
    assert "exchange that nothing hides" in text
    plot(record(), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    (tmp_path / "x.json").write_text(json.dumps(record()))
