"""What a Tracer writes is what read_trace gives back, and a replayed plan is the plan that ran."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm_sglang.config import SparseConfig
from mm_sglang.demo.picture import Panel, attended_pixels, draw, tile_rows
from mm_sglang.demo.report import density_table, prompt_chunks, recalls, replay
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import attended
from mm_sglang.kernels.layout import VIDEO, TokenLayout, consume_grids
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.trace import Tracer, read_trace

ITEMS = tuple(consume_grids(VIDEO, [(6, 16, 16)], [(10, 394)], 2))


def traced(folder: Path) -> SparseConfig:
    """Two chunks of one request through two heads, traced as a server does."""
    config = SparseConfig.from_settings(
        {
            "default": {"pattern": "a_shape", "sink": 8, "local": 40},
            "layers": {1: {"heads": {1: {"pattern": "grid", "lines": 1, "sink": 8, "local": 40}}}},
            "trace": {"dir": str(folder), "tensors": [1]},
        }
    )
    assert config.trace is not None
    tracer = Tracer(config.trace, rank=0, first_head=0)
    q, k, v = torch.randn(3, 700, 2, 16, generator=torch.Generator().manual_seed(0))
    for start, end in ((0, 300), (300, 700)):
        layout = TokenLayout(items=ITEMS, length=end)
        for layer in (0, 1):
            patterns = config.patterns(layer, 2)
            assert patterns is not None
            out, _, plan = sparse_prefill(
                q[start:end], k[:end], v[:end], layout=layout, patterns=patterns, scale=0.25,
                engine=engine("reference"), tail=config.text_tail,
            )  # fmt: skip
            tracer.record("r1", layer, layout, plan, (q[start:end], k[:end], v[:end], out))
    return config


def test_a_trace_can_be_replayed_measured_and_drawn(tmp_path: Path) -> None:
    config = traced(tmp_path)
    chunks = prompt_chunks(read_trace(tmp_path))
    assert [(c["layer"], c["prefix"], c["queries"]) for c in chunks] == [
        (0, 0, 300),
        (1, 0, 300),
        (0, 300, 400),
        (1, 300, 400),
    ]
    table = density_table(chunks)
    assert [(row.layer, row.pattern, row.heads) for row in table] == [
        (0, "a_shape", 2),
        (0, "text_tail", 2),
        (1, "a_shape", 1),
        (1, "grid", 1),
        (1, "text_tail", 2),
    ]
    assert table[0].causal_tiles == 2 * (1 + 2 + 3 + 4 + 5 + 6 + 6)  # three rows of tiles, then four from position 300

    layout, plans, saved = replay(tmp_path, [c for c in chunks if c["layer"] == 1], config)
    assert (layout.items, layout.length, len(plans)) == (ITEMS, 700, 2)
    a_shape, grid = recalls(plans, saved)
    assert 0 < a_shape.recall < 1 and a_shape.error > 0
    assert 0 < grid.recall <= 1

    panel = Panel(title="grid", head=1, plans=tuple(plans))
    pixels, seen = attended_pixels(panel, 700), [attended(plan, 1) for plan in plans]
    assert float(pixels[0, 0]) == 1.0 and float(pixels[0, -1]) == -1.0
    whole = sum(group.query_tiles for plan in plans for group in plan.groups[2:])  # rows computed with every key
    assert whole == 1 + 3 + 1 and tile_rows(panel).shape == (3 + 4 + whole, 7)
    share = sum(float(a.sum()) for a in seen) / (700 * 701 / 2)
    assert abs(float(pixels[pixels >= 0].mean()) - share) < 0.05
    draw([panel], layout, "title", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_cut_short_is_left_out_and_no_chunk_is_an_error(tmp_path: Path) -> None:
    traced(tmp_path)
    with (tmp_path / "rank0.jsonl").open("a") as lines:
        lines.write('{"rid": "r2", "lay')
    assert {line["rid"] for line in read_trace(tmp_path)} == {"r1"}
    with pytest.raises(ValueError, match="holds no sparse chunk"):
        prompt_chunks(read_trace(tmp_path / "gone"))


def test_a_plan_that_differs_is_not_shown(tmp_path: Path) -> None:
    traced(tmp_path)
    other = SparseConfig.from_settings({"default": {"pattern": "a_shape", "sink": 8, "local": 300}})
    with pytest.raises(RuntimeError, match="differs from the one the server ran"):
        replay(tmp_path, [c for c in prompt_chunks(read_trace(tmp_path)) if c["layer"] == 1], other)
