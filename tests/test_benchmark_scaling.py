"""benchmarks.scaling without a GPU: what it would run, the table and the picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling.parts import CONTESTANTS, ZIGZAG, require_room, specs, text_model
from benchmarks.scaling.record import take_up, with_run
from benchmarks.scaling.report import balances, lost, plot, table
from benchmarks.scaling.text_model import make_text_model
from benchmarks.ttft import __main__ as ttft
from benchmarks.ttft.model import TEXT, make_model


def record() -> dict[str, Any]:
    def run(gpus: int, name: str, seconds: float, **more: Any) -> dict[str, Any]:
        ttft = [{"tokens": 1 << 20, "seconds": seconds, "peak_gb": 90.0}]
        return {"gpus": gpus, "name": name, "chunk": 32768, "ttft": ttft, **more}

    ranks = [{"stages": {"attention": 2.0, "exchange between GPUs": 0.1}}, {"stages": {"attention": 1.0}}]
    profile = {
        "tokens": 1 << 20, "seconds": 11.0, "ranks": ranks, "stages": ranks[0]["stages"], "exposed_exchange": 0.05,
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


def test_zigzag_runs_a_text_model_of_the_same_shape(tmp_path: Path) -> None:
    """SGLang itself takes the arguments; whether it serves them needs GPUs."""
    from sglang.srt.server_args import ServerArgs

    assert [one["name"] for one in specs(1, [1 << 18], 1, 32768, list(CONTESTANTS), tmp_path)] == ["mm_sparse", "stock"]
    ours, tensor, zigzag = specs(2, [1 << 18], 1, 32768, list(CONTESTANTS), tmp_path)
    assert (zigzag["name"], zigzag["arguments"]["cp_strategy"]) == (ZIGZAG, "zigzag")
    assert "attn_cp_size" not in tensor["arguments"] and zigzag["lengths"] == ours["lengths"]
    model = make_model(tmp_path / "1-layers", layers=1, positions=1 << 19)
    config = json.loads(
        (make_text_model(text_model(tmp_path, 1), model, layers=1, positions=1 << 19) / "config.json").read_text()
    )
    assert config["architectures"] == ["Qwen3ForCausalLM"] and {key: config[key] for key in TEXT} == TEXT
    arguments = ServerArgs(**zigzag["arguments"], device="cuda")
    assert (arguments.attn_cp_size, arguments.tp_size, arguments.prefill_attention_backend) == (2, 2, "fa3")


@pytest.mark.parametrize(
    ("layers", "tokens", "gb", "refused"),
    [
        (28, 1 << 20, 150, []),  # an H200
        (28, 1 << 20, 85, ["mm_sparse", ZIGZAG]),  # an H100: tensor parallelism has half of it on each
        (14, 1 << 20, 85, []),
        (28, 1 << 18, 85, []),
    ],
)
def test_what_does_not_fit_is_known_before(
    tmp_path: Path, layers: int, tokens: int, gb: int, refused: list[str]
) -> None:
    found = []
    for spec in specs(2, [tokens], layers, 131072, list(CONTESTANTS), tmp_path):
        try:
            require_room(spec, gb * 10**9)
        except ValueError as error:
            found.append(spec["name"])
            assert "need 80 GB of a GPU, 64 GB are for them" in str(error)
    assert found == refused


@pytest.mark.parametrize("other", [{"gpu": "NVIDIA H100 80GB HBM3"}, {"commit": "def"}, {"layers": 14}])
def test_rows_of_another_gpu_commit_or_depth_are_kept_apart(tmp_path: Path, other: dict[str, Any]) -> None:
    held, out = record(), tmp_path / "scaling.json"
    for kept in ("scaling-abc-28", "scaling-abc-28-2"):
        out.write_text(json.dumps(held))
        assert take_up(out, held["about"], 28)["runs"] == held["runs"]
        about = held["about"] | {key: value for key, value in other.items() if key != "layers"}
        assert take_up(out, about, other.get("layers", 28)) == {
            "about": about,
            "layers": other.get("layers", 28),
            "runs": [],
        }
        assert json.loads((tmp_path / f"{kept}.json").read_text()) == held and not out.exists()


def test_a_run_takes_the_place_of_its_like_unless_it_has_nothing() -> None:
    runs = record()["runs"]
    assert with_run(runs, runs[0] | {"ttft": []}) == [runs[1], runs[2], runs[0]]
    new = runs[0] | {"ttft": [{"tokens": 1, "seconds": 1.0, "peak_gb": 1.0}]}
    assert with_run(runs, new) == [runs[1], runs[2], new]
    assert len(with_run(runs, new | {"lengths": [1]})) == len(runs) + 1


def test_time_lost_is_exposed_exchange_and_imbalance() -> None:
    seconds, share = lost(record()["runs"][1]["profile"])
    assert seconds == pytest.approx(0.05 + 2.0 - 1.5) and share == pytest.approx(0.55 / 11)
    assert "lost to gather and imbalance        0.550   5.0% of the prefill" in table(record())


def test_a_call_ends_in_its_minutes_and_a_failing_run_ends_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[dict[str, Any]] = []

    def run(spec: dict[str, Any], folder: Path, gpus: str, seen: Any) -> dict[str, Any]:
        ran.append(spec)
        about = {key: spec[key] for key in ("name", "layers", "chunk")} | {"ttft": []}
        seen(about)
        return about | ({"error": "exit code 1"} if spec["name"] == "mm_sparse" else {})

    monkeypatch.setattr(scaling, "run", run)
    monkeypatch.setattr(scaling, "machine", lambda: record()["about"])
    monkeypatch.setattr(scaling, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=85 * 10**9))
    out = tmp_path / "scaling.json"
    monkeypatch.setattr("sys.argv", ["x", "--layers", "1", "--minutes", "5", "--out", str(out)])
    began = time.time()
    assert scaling.main() == 1
    assert [one["name"] for one in ran] == list(CONTESTANTS)
    assert began + 200 < ran[0]["deadline"] < began + 5 * 60 - ttft.GRACE
    stored = json.loads(out.read_text())["runs"]
    assert [one.get("error") for one in stored] == ["exit code 1", None, None] and stored[2]["gpus"] == 2


def test_a_prediction_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h200" / "scaling-75c246a6ac79-28.json"
    monkeypatch.setattr("sys.argv", ["x", "--predict", str(held), "--out", str(tmp_path / "x.txt")])
    assert scaling.main() == 0
    text = (tmp_path / "x.txt").read_text()
    assert "323 GB/s" in text and [line.split()[:3] for line in text.splitlines()[4:6]] == [
        ["1", "128K", "256K"],
        ["2", "128K", "256K"],
    ]


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
