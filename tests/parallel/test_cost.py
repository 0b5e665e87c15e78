"""The cost model: what it must say whatever the figures are, bad input, and its fit to what one GPU was measured at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling.model import beside, figures, prediction_table
from mm_sglang.parallel.cost import Figures, Links, predict

ONE = Figures(
    layers=28, kv_bytes=57344, row_bytes=14336, linear=2e-5, attention=2e-6, tiles=3e-13, estimate=1.5e-7,
    repeated=5e-8, vision=9e-6, decode=1e-4,
)  # fmt: skip
LINKS, K, M = Links(), 1 << 10, 1 << 20
RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200" / "ttft.json"


def seconds(gpus: int = 1, tokens: int = M, chunk: int = 32 * K, **more: Any) -> float:
    return predict(more.pop("given", ONE), LINKS, tokens=tokens, gpus=gpus, chunk=chunk, **more).ttft


def test_one_gpu_takes_the_sum_of_its_figures() -> None:
    keys, pairs = 3 * K * 2, 2 * K * (2 * K + 4 * K)  # chunks of 2K end at 2K and 4K
    want = 4 * K * (ONE.linear + ONE.attention + ONE.vision + ONE.decode)
    want += keys * (ONE.estimate + ONE.repeated) + pairs * ONE.tiles
    assert seconds(tokens=4 * K, chunk=2 * K) == pytest.approx(want)
    parts = predict(ONE, LINKS, tokens=M, gpus=1, chunk=32 * K).parts
    assert parts["gather"] == parts["latency"] == parts["waiting"] == 0


def test_more_gpus_are_faster_but_never_more_than_their_number() -> None:
    for tokens in (M, 10 * M):
        times = [seconds(n, tokens, 32 * K * n, workers=10**6) for n in (1, 2, 4, 8)]
        assert times == sorted(times, reverse=True)
        same_chunk = [seconds(n, tokens, 128 * K, workers=10**6) for n in (1, 2, 4, 8)]
        assert all(same_chunk[0] / n <= t * (1 + 1e-9) for n, t in zip((1, 2, 4, 8), same_chunk, strict=True))


@pytest.mark.parametrize("gpus, hosts, pipeline", [(1, 1, True), (4, 1, True), (16, 2, True), (16, 2, False)])
def test_more_work_takes_longer(gpus: int, hosts: int, pipeline: bool) -> None:
    base = seconds(gpus, hosts=hosts, pipeline=pipeline)
    assert seconds(gpus, 2 * M, hosts=hosts, pipeline=pipeline) > 2 * base * 0.99
    for name in ("linear", "attention", "tiles", "estimate", "repeated", "vision", "decode"):
        slower = replace(ONE, **{name: 2 * getattr(ONE, name)})
        assert seconds(gpus, hosts=hosts, pipeline=pipeline, given=slower) > base, name
    assert seconds(gpus, hosts=hosts, pipeline=pipeline, balance=1.5) > base


def test_a_pipeline_waits_for_its_stages_to_fill() -> None:
    """Of equal chunks, all but the last stage's share of the first."""
    even = replace(ONE, estimate=0.0, repeated=0.0, tiles=0.0, row_bytes=0, vision=0.0, decode=0.0)
    free = replace(LINKS, latency=0.0)
    found = predict(even, free, tokens=16 * 32 * K, gpus=4, hosts=4, chunk=32 * K)
    assert found.parts["waiting"] == pytest.approx(3 / 16 * sum(v for k, v in found.parts.items() if k != "waiting"))
    whole = predict(ONE, LINKS, tokens=M, gpus=4, chunk=32 * K).kv_bytes
    assert whole == M * ONE.kv_bytes and predict(ONE, LINKS, tokens=M, gpus=4, hosts=4, chunk=K).kv_bytes == whole / 4


@pytest.mark.parametrize(
    "wrong, message",
    [({"tokens": 0}, "tokens=0: needs at least 1"), ({"gpus": 6, "hosts": 4}, "gpus=6 over hosts=4"),
     ({"balance": 0.5}, "balance=0.5: needs at least 1")],
)  # fmt: skip
def test_bad_input_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seconds(**wrong)


def test_the_model_meets_what_one_gpu_took_at_other_lengths() -> None:
    """Its figures come from the profile at 1M alone."""
    record = json.loads(RECORD.read_text())
    rows = list(beside(record, figures(record), LINKS))
    assert {tokens for _, tokens, _, _ in rows} == {128 * K, 256 * K, 512 * K, 1024 * K}
    for _, tokens, measured, modelled in rows:
        assert modelled == pytest.approx(measured, rel=0.04), tokens
    text = prediction_table(record, vision=9e-6, decode=1e-4, workers=100)
    assert "vision" in text and "decode" in text and "gather" in text
    with pytest.raises(ValueError, match="no profile of mm_sparse on one GPU"):
        figures({"runs": [{"name": "stock", "layers": 28}]})


def test_a_kernel_compiled_during_the_profile_counts_for_nothing() -> None:
    profile = {"tokens": 1 << 20, "seconds": 12.0, "stages": {"linear layers": 9.0, "attention": 1.0}, "largest": {}}
    waits = [[2.5, 1.5, "_keep", "_buckets"], [7.0, 0.5, "_count", "_place"], [8.0, 0.02, "copy", "Memcpy HtoD"]]
    run = {"name": "mm_sparse", "gpus": 1, "layers": 12, "chunk": 1 << 17}
    plain, waited = (
        figures({"runs": [run | {"profile": profile | more}]}) for more in ({"seconds": 10.0}, {"waits": waits})
    )
    assert waited == plain
