"""A model's hash: changed weights change it, wherever in a tensor, and a large file is not read whole."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mm_sglang.config import SparseConfig
from mm_sglang.model_hash import PIECE, PIECES, model_hash, require_same_model


def model(folder: Path, *, change: float = 0.0, where: slice = slice(0, 0)) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    weights = {"norm": torch.ones(8), "proj": torch.zeros(PIECES * PIECE, dtype=torch.bfloat16)}
    weights["proj"][where] += change
    save_file(weights, folder / "model.safetensors")
    return model_hash(str(folder))


def test_retrained_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    assert model(tmp_path / "b") == first and len(first) == 16
    ends = PIECES * PIECE
    for where in (slice(None), slice(0, 8), slice(ends - 8, ends)):
        assert model(tmp_path / "c", change=1.0, where=where) != first
    config = SparseConfig.from_mapping({"default": {"pattern": "dense"}, "provenance": {"model_hash": first}})
    require_same_model(config, str(tmp_path / "b"))
    with pytest.raises(ValueError, match="needs a search of its own"):
        require_same_model(config, str(tmp_path / "c"))


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    """700 tensors over a sparse file of 16 GB, which takes no room."""
    tensor = 23 << 20
    spans = {f"w{n}": {"dtype": "BF16", "shape": [tensor // 2], "data_offsets": [n * tensor, (n + 1) * tensor]}
             for n in range(700)}  # fmt: skip
    header = str(spans).replace("'", '"').encode()
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 700 * tensor)
    began = time.monotonic()
    model_hash(str(tmp_path))
    assert time.monotonic() - began < 1.0


def test_what_is_no_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"model.safetensors: no safetensors file"):
        model_hash(str(tmp_path))
