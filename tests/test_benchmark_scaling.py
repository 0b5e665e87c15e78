"""benchmarks.scaling without a GPU: what it would run, the table and the picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling.parts import specs
from benchmarks.scaling.report import balances, plot, table
from benchmarks.ttft import __main__ as ttft


def record() -> dict[str, Any]:
    def run(gpus: int, name: str, seconds: float, **more: Any) -> dict[str, Any]:
        ttft = [{"tokens": 1 << 20, "seconds": seconds, "peak_gb": 90.0}]
        return {"gpus": gpus, "name": name, "chunk": 32768, "ttft": ttft, **more}

    ranks = [{"stages": {"attention": 2.0, "exchange between GPUs": 0.1}}, {"stages": {"attention": 1.0}}]
    profile = {
        "tokens": 1 << 20, "ranks": ranks, "stages": ranks[0]["stages"], "exposed_exchange": 0.05,
        "timeline": [["7", 0.0, 2.0, "attention"], ["20", 0.5, 1.0, "exchange between GPUs"]],
    }  # fmt: skip
    runs = [run(1, "mm_sparse", 24.0), run(2, "mm_sparse", 15.0, profile=profile), run(2, "stock", 180.0)]
    return {"about": {"gpu": "NVIDIA H200", "commit": "abc"}, "layers": 28, "runs": runs}


def test_ranks_get_one_prompt_together(tmp_path: Path) -> None:
    (one, stock), (ours, tensor) = (
        specs(gpus, [1 << 18, 1 << 20], 28, 65536, ["mm_sparse", "stock"], tmp_path) for gpus in (1, 4)
    )
    assert "attn_cp_size" not in one["arguments"] and "tp_size" not in stock["arguments"]
    assert ours["arguments"]["attn_cp_size"] == ours["arguments"]["tp_size"] == tensor["arguments"]["tp_size"] == 4
    assert ours["arguments"]["enable_prefill_cp"] and "attn_cp_size" not in tensor["arguments"]
    assert ours["chunk"] == ours["arguments"]["chunked_prefill_size"] == 65536
    assert [one["name"] for one in specs(4, [1 << 18], 28, 65536, ["stock"], tmp_path)] == ["stock"]
    assert ours["lengths"] == tensor["lengths"] and ours["profile"] == 1 << 20


def test_the_table_says_efficiency_ratio_and_balance(tmp_path: Path) -> None:
    text = table(record())
    row = next(line for line in text.splitlines() if line.startswith("   2  mm_sparse"))
    assert row.split() == ["2", "mm_sparse", "32K", "1024K", "15.000", "0.80", "12.00x", "90.0"]
    stage, slowest, over_mean = balances(record()["runs"][1]["profile"])[0]
    assert (stage, slowest) == ("attention", 2.0) and over_mean == pytest.approx(2 / 1.5)
    assert "exchange that nothing hides" in text
    plot(record(), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    (tmp_path / "x.json").write_text(json.dumps(record()))


def test_a_run_tells_each_figure_at_once_and_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a child that stores one figure, then never ends."""
    child = tmp_path / "benchmarks" / "ttft" / "child.py"
    child.parent.mkdir(parents=True)
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (child.parent / "__init__.py").touch()
    child.write_text(
        "import sys, time, pathlib\npathlib.Path(sys.argv[2]).write_text('{\"ttft\": [1]}')\ntime.sleep(600)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ttft, "START", 1)
    monkeypatch.setattr(ttft, "GRACE", 1)
    spec = {"part": "scaling", "name": "stock", "layers": 4, "chunk": 32768, "mixed_chunk": False}
    seen: list[dict[str, Any]] = []
    began = time.time()
    record = ttft.run(spec | {"deadline": began + 3}, tmp_path, "0", seen.append)
    assert seen[0]["ttft"] == [1] and seen[0]["name"] == "stock" and record["error"] == "ended 1 s after its time"
    assert time.time() - began < 60
    late = ttft.run(spec | {"deadline": time.time()}, tmp_path, "0", seen.append)
    assert late["ttft"] == [] and late["left_out"] == ["everything: no time to start SGLang"]
