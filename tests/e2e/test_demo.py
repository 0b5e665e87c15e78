"""`mm-sglang demo`: the trained model answers about needles in a video, and as well through mm_sparse as dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from asking import FORKED

from mm_sglang.demo import run
from mm_sglang.demo.trained import trained_model

pytestmark = pytest.mark.e2e


def weights_are_here() -> bool:
    try:
        trained_model()
    except ValueError:
        return False
    return True


@pytest.mark.skipif(not weights_are_here(), reason="needs the trained model's weights in mm_sglang/demo/model")
def test_questions_about_needles_are_answered_and_sparse_answers_are_dense_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "VIDEO_S", 32.0)  # half of the demo's own, for the time
    for name, value in FORKED.items():
        monkeypatch.setenv(name, value)
    assert run.run_demo(out=tmp_path, video=None, question=None, seed=1) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["questions"]
    assert len(rows) == run.NEEDLES == len({row["truth"] for row in rows})
    assert sum(row["answers"]["dense"] == row["truth"] for row in rows) >= 4, rows
    assert [row["answers"]["mm_sparse"] for row in rows] == [row["answers"]["dense"] for row in rows]
    assert report["dense_layers"] == [] and {row["layer"] for row in report["density"]} == set(range(5))
    assert sum(row["tiles"] for row in report["density"]) < 0.5 * sum(row["causal_tiles"] for row in report["density"])
    assert (tmp_path / "skipped.png").stat().st_size > 10_000
