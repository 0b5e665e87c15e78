"""MInference's head configurations become ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm_sglang.cli import main
from mm_sglang.config import SparseConfig
from mm_sglang.kernels.patterns import AShape, BlockTopK, VerticalSlash


def test_every_type_is_converted(tmp_path: Path) -> None:
    source, out = tmp_path / "llama.json", tmp_path / "llama.yaml"
    layer = {
        "0": ["vertical_and_slash", 1000, 6096, 336.6],
        "1": ["stream_llm", 100, 800, 0.9],
        "2": ["block_sparse", 101, 0, 0.5],
    }
    source.write_text(json.dumps([layer, {"0": ["vertical_and_slash", 30, 0, 1.0]}]))
    assert main(["convert", str(source), "--out", str(out)]) == 0
    config = SparseConfig.from_yaml(out)
    first = config.layers[0].heads
    assert first[0] == VerticalSlash(columns=1000, slashes=6096) and first[1] == AShape(sink=100, local=800)
    assert first[2] == BlockTopK(blocks=51)
    assert config.layers[1].heads[0] == VerticalSlash(columns=30, slashes=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "Expecting"),
        ("{}", "needs a list of layers"),
        ('[{"0": ["dynamic_grid", 1, 2, 3]}]', "layer 0 head 0: ['dynamic_grid', 1, 2, 3]: needs"),
        ('[{"0": ["stream_llm", -1, 2, 3]}]', "needs whole numbers from 0"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "x.json", tmp_path / "x.yaml"
    source.write_text(text)
    assert main(["convert", str(source), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err and not out.exists()
