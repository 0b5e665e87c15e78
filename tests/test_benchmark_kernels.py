"""benchmarks/kernels without a GPU: the inputs, the sampled-row check, the command line, the report.

Figures in this file are made up to exercise the report; none comes from a measurement.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # benchmarks/ is not part of the installed package
    sys.path.append(str(ROOT))

from benchmarks.kernels import cases, checks, marks, measure, planted, report, rivals, rows, session  # noqa: E402
from benchmarks.kernels.__main__ import main  # noqa: E402
from mm_sglang.kernels import inspection  # noqa: E402
from mm_sglang.kernels.engines import engine  # noqa: E402
from mm_sglang.kernels.patterns import head_pattern  # noqa: E402
from mm_sglang.kernels.prefill import sparse_prefill  # noqa: E402

K = 1024


@pytest.mark.parametrize("kind", [*planted.KINDS, "mix"])
def test_planted_keys_hold_the_mass(kind: str) -> None:
    kv_heads = 5 if kind == "mix" else 2
    q, k, v, truth = planted.planted(kind, tokens=8000, q_heads=2 * kv_heads, kv_heads=kv_heads, device="cpu", seed=3)
    assert q.shape == (8000, 2 * kv_heads, 128) and k.shape == v.shape == (8000, kv_heads, 128)
    at = rows.sample(8000, 0, 24, 0, late=True)
    masks = torch.stack([truth.keys(head, at) for head in range(2 * kv_heads)])
    result = rows.exactness(q, k, v, q, at, masks, 128**-0.5)
    assert result.recall.min() > 0.95, result.recall
    assert masks.float().mean() < 0.1, "what is planted is a small part of the keys"


def test_random_inputs_have_nothing_planted() -> None:
    *_, truth = planted.planted("random", tokens=300, q_heads=2, kv_heads=1, device="cpu")
    assert not truth.keys(1, torch.arange(300)).any()


@pytest.mark.parametrize("wrong", [{"kind": "rings"}, {"q_heads": 3}, {"tokens": 0}])
def test_planted_refuses(wrong: dict[str, Any]) -> None:
    kind = wrong.pop("kind", "grid")
    with pytest.raises(ValueError, match="needs"):
        planted.planted(kind, **{"tokens": 256, "q_heads": 4, "kv_heads": 2, "device": "cpu", **wrong})


@pytest.mark.parametrize(
    "recipe",
    [
        {"pattern": "vertical_slash", "columns": 40, "slashes": 200},
        {"pattern": "grid", "lines": 2},
        {"pattern": "block_topk", "blocks": 2},
        cases.fitted("boundary", 900),
    ],
    ids=["vertical_slash", "grid", "block_topk", "boundary"],
)
@pytest.mark.parametrize("prefix", [0, 301])
def test_sampled_rows_are_the_plans_and_the_engine_is_right(recipe: dict[str, Any], prefix: int) -> None:
    q, k, v, _ = planted.planted("boundary", tokens=4000, q_heads=2, kv_heads=1, device="cpu", seed=1)
    q, k, v = q[3000 + prefix :], k[3000:], v[3000:]
    layout = planted.layout_of("boundary", 4000, "cpu").until(1000)
    out, _, plan = sparse_prefill(
        q, k, v, layout=layout, patterns=[head_pattern(recipe)] * 2, scale=128**-0.5, engine=engine("reference")
    )
    at = rows.sample(1000 - prefix, prefix, 40, 5, late=False)
    seen = rows.look(plan, at)
    for head in range(2):
        assert torch.equal(seen.masks[head], inspection.attended(plan, head)[at - prefix])
    counts = [inspection.tile_counts(group) for group in plan.groups]
    assert (seen.tiles, seen.partial) == tuple(sum(c) for c in zip(*counts, strict=True))
    assert seen.future == 0
    good = rows.exactness(q, k, v, out, at, seen.masks, 128**-0.5)
    assert good.ratio <= 2
    spoilt = out.clone()
    spoilt[at[7] - prefix, 1, 3] = torch.nan
    assert rows.exactness(q, k, v, spoilt, at, seen.masks, 128**-0.5).ratio == rows.WRONG
    assert rows.exactness(q, k, v, out.roll(1, 2), at, seen.masks, 128**-0.5).ratio > 2


def test_poison_shows_in_unwritten_memory() -> None:
    with checks.poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert not torch.empty(3, dtype=torch.int32).is_floating_point()
    assert torch.empty(0).shape == (0,)


@pytest.mark.parametrize(
    "arguments, needed",
    [
        (["--lengths", "10"], "at least 256"),
        (["--lengths", "many"], "invalid int"),
        (["--shapes", "gpt-9"], "invalid choice"),
        (["--cases", "everything"], "invalid choice"),
        (["--budget-seconds", "3"], "needs more"),
        (["--show", "no/such/file.json"], "needs a table"),
        (["--fast"], "unrecognized"),
    ],
)
def test_command_line_refuses_in_one_line(arguments: list[str], needed: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and needed in said and said.count("\n") == 1


def made_up_rows(speedup: float = 20.0) -> list[measure.Row]:
    """Not measured: figures that only have to be plausible enough to print and plot."""
    out = []
    for tokens in (8 * K, 16 * K, 32 * K, 128 * K, 512 * K, 1024 * K):
        dense = measure.causal_flops(tokens, 28) / 6e11
        for name, ms in (("FA4 dense", dense), ("FA3 dense", dense * 1.1)):
            out.append(measure.rival_row("qwen2.5-vl-7b", tokens, name, [ms], measure.causal_flops(tokens, 28)))
        for case in ("mix", "paper layer", "grid"):
            stages = dict.fromkeys(report.STAGES, 0.01 * dense / speedup) | {"attend": 0.95 * dense / speedup}
            out.append(measure.Row(
                shape="qwen2.5-vl-7b", tokens=tokens, case=case, contestant=marks.OURS, ms=dense / speedup,
                times=[1.0], tflops=570.0, stages=stages, work=dict.fromkeys(stages, (1e12, 1e9)), overhead=0.05,
                tiles=1000, partial=0.1, density=0.05, recall=0.97, worst_recall=0.96, error_ratio=1.1, extra_gb=0.5,
            ))  # fmt: skip
    out.append(measure.Row(shape="-", tokens=0, case="-", contestant="MInference", missing="not there"))
    return out


ABOUT: dict[str, Any] = {
    "gpu": "made up", "driver": "0", "commit": "0", "date": "never", "versions": {}, "left_out": ["a row"],
    "ceilings": {"tflops": 780.0, "tbps": 4.25},
}  # fmt: skip


def test_report_keeps_and_shows_every_row(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "results" / "kernels.json"
    report.to_json(path, ABOUT, made_up_rows())
    about, held = report.from_json(path)
    assert held[0].to_dict() == made_up_rows()[0].to_dict() and about["left_out"] == ["a row"]
    assert json.loads(path.read_text())["marks"]
    assert main(["--show", str(path)]) == 0
    said = capsys.readouterr().out
    assert (
        said.count("FA3 dense") == 6 and "not measured: MInference: not there" in said and "left out, no time" in said
    )
    for name in ("kernels-roofline.png", "kernels-speedup.png"):
        assert (path.with_name(name)).read_bytes().startswith(b"\x89PNG")


def test_marks_pass_fall_short_and_stay_open() -> None:
    table = {m.figure: m for m in marks.marks(made_up_rows()) if m.shape == "qwen2.5-vl-7b"}
    assert table["mix at 128K / best dense"].verdict == "pass"
    assert table["mix at 512K / best dense"].verdict == "SHORT"
    assert table["rate of block_topk at 128K / FA4 dense"].verdict == "not measured"
    assert table["shortest length that is faster than dense"].got == 8 * K
    poor = made_up_rows()
    for row in poor:
        row.recall = 0.5
    assert {m.figure: m for m in marks.marks(poor)}["mix at 128K / best dense"].verdict == "SHORT"


class _Event:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return (other.at - self.at) * 1e3


def test_a_whole_session_with_the_reference_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything between the checks and the file, at toy sizes, with CUDA's clock and memory counters faked."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *a: 1 << 20)
    monkeypatch.setattr(session, "SHAPES", {"toy": (5, 5)})
    monkeypatch.setattr(session, "SHORT_LENGTHS", (260,))
    monkeypatch.setattr(measure, "LEAST", 1)
    monkeypatch.setattr(measure, "MOST", 1)

    def run(tensors: rivals.Tensors, scale: float) -> torch.Tensor:
        q, k, v = (x.float().transpose(0, 1) for x in tensors)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1)

    def broken(tensors: rivals.Tensors, scale: float) -> torch.Tensor:
        raise RuntimeError("too long for me")

    dense = rivals.Rival(name="FA4 dense", dense=True, package="torch", probe=lambda: None, run=run)
    other = rivals.Rival(name="FA3 dense", dense=True, package="torch", probe=lambda: None, run=broken)
    it = session.Session(
        about=dict(ABOUT),
        options=session.Options(
            lengths=(380,), shapes=("toy",), cases=(cases.MIX, cases.PAPER), engine="reference",
            out=tmp_path / "kernels.json", budget=None, quick=False, seed=1,
        ),
    )  # fmt: skip
    it.run((dense, other), torch.device("cpu"))
    assert not it.failed and not it.left_out, [r.missing for r in it.rows]
    _, held = report.from_json(tmp_path / "kernels.json")
    ours = [r for r in held if r.contestant == marks.OURS]
    assert [(r.tokens, r.case) for r in ours] == [(260, "mix"), (380, "mix"), (380, "paper layer")]
    assert all(r.error_ratio is not None and r.error_ratio <= 2 and (r.recall or 0) > 0.9 for r in ours)
    assert [r.missing for r in held if r.contestant == "FA3 dense"] == ["RuntimeError: too long for me"] * 2
    assert report.table_text(held).count("FA4 dense") == 2
    it.options = session.Options(**{**vars(it.options), "budget": time.monotonic() + 0.5})
    it.run((dense,), torch.device("cpu"))
    assert len(it.left_out) == 3, "no time for anything"
