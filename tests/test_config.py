"""SparseConfig: what it accepts, which recipe each head gets, and how it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mm_sglang.config import SparseConfig, default_config
from mm_sglang.kernels.patterns import AShape, Grid, VerticalSlash
from mm_sglang.parallel.heads import local_heads

GOOD = """
default: {pattern: vertical_slash, columns: 100, slashes: 50}
layers:
  1: {default: {pattern: a_shape, local: 64}, heads: {0: {pattern: grid, lines: 2}, 3: {pattern: dense}}}
  2: {heads: {1: {pattern: dense}}}
  3: {default: {pattern: dense}}
dense_layers: [0]
min_tokens: 7
provenance: {model: sha256, recall: 0.97}
"""


def test_recipes_by_layer_and_head(tmp_path: Path) -> None:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    config = SparseConfig.from_settings(str(path))
    config.check_model(layers=4, heads=4)
    slash = VerticalSlash(columns=100, slashes=50)
    assert config.patterns(0, 4) is None
    layer1 = config.patterns(1, 4)
    assert layer1 is not None and layer1[:3] == (Grid(lines=2), AShape(local=64), AShape(local=64))
    assert [p.kind for p in config.patterns(2, 4) or ()] == [
        "vertical_slash",
        "dense",
        "vertical_slash",
        "vertical_slash",
    ]
    assert config.patterns(3, 4) is None  # all heads dense: the whole layer goes to the dense backend
    assert config.patterns(9, 2) == (slash, slash)
    assert config.min_tokens == 7 and config.provenance["recall"] == 0.97


def test_json_settings_have_strings_for_numbers() -> None:
    config = SparseConfig.from_settings(
        {"default": {"pattern": "dense"}, "layers": {"2": {"heads": {"5": {"pattern": "grid"}}}}}
    )
    assert (config.patterns(2, 6) or ())[5] == Grid()


def test_no_settings_mean_the_default_file() -> None:
    assert SparseConfig.from_settings(None) == SparseConfig.from_yaml(default_config())


def test_configs_are_frozen() -> None:
    config = SparseConfig.from_settings(None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.min_tokens = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.layers[0] = None  # type: ignore[index]


SLASH: dict[str, Any] = {"pattern": "vertical_slash"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"default": {"pattern": "zigzag"}}, "pattern='zigzag': needs one of .*'grid'"),
        ({"default": {}}, "needs a mapping with the key 'pattern'"),
        ({}, "needs the key 'default'"),
        ({"default": SLASH, "min_token": 3}, "unknown key 'min_token': needs one of"),
        ({"default": SLASH | {"budget": 3}}, "pattern vertical_slash: unknown key 'budget'"),
        ({"default": SLASH | {"columns": 0}}, "columns=0: needs a whole number of at least 1"),
        ({"default": SLASH | {"local": 0}}, "local=0"),
        ({"default": SLASH | {"slashes": 2.5}}, "slashes=2.5"),
        ({"default": {"boundary": "q", "parts": {"text": SLASH}}}, r"parts \('text',\): needs each of"),
        (
            {"default": {"boundary": "q", "parts": {"text": SLASH, "vision": SLASH | {"boundary": "k"}}}},
            "without a bou",
        ),
        ({"default": {"parts": {"text": SLASH}}}, "'boundary' beside it"),
        ({"default": {"pattern": "grid", "boundary": "2d"}}, "horizontal=True: needs false"),
        ({"default": SLASH | {"coverage": 1.5}}, "coverage=1.5: needs a number above 0"),
        ({"default": {"pattern": "block_topk", "blocks": 0}}, "blocks=0: needs a whole number"),
        ({"default": {"pattern": "block_topk", "score": "mean"}}, "score='mean': needs one of"),
        ({"default": {"pattern": "block_topk", "least": 2}}, "least=2: needs a number from 0 to 1"),
        ({"default": SLASH | {"boundary": "x"}}, "boundary='x': needs one of"),
        ({"default": {"pattern": "grid", "stride": 7}}, "stride=7: needs one of"),
        ({"default": {"pattern": "grid", "vertical": False, "horizontal": False}}, "needs one of them true"),
        ({"default": SLASH, "layers": {"one": {}}}, "layers: 'one': needs a whole number"),
        ({"default": SLASH, "layers": {1: {"head": {}}}}, "layers: 1: unknown key 'head'"),
        ({"default": SLASH, "layers": {1: {"heads": {0: {"pattern": "no"}}}}}, "layers: 1: pattern='no'"),
        ({"default": SLASH, "layers": {1: {}}, "dense_layers": [1]}, "layer 1 is in dense_layers and in layers"),
        ({"default": SLASH, "dense_layers": 3}, "dense_layers: got 3: needs a list"),
        ({"default": SLASH, "min_tokens": 0}, "min_tokens=0"),
        ({"default": SLASH, "trace": {"tensors": [0]}}, "trace: dir=None: needs a folder"),
        ([1], "mm_sparse: got list"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseConfig.from_settings(settings)


@pytest.mark.parametrize("text", ["{", "- 1", "default: {pattern: no}", "\xff"])
def test_wrong_files_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config .*bad\.yaml: [^\n]*$"):
        SparseConfig.from_yaml(path)
    with pytest.raises(ValueError, match=r"config .*gone\.yaml"):
        SparseConfig.from_yaml(tmp_path / "gone.yaml")


def test_layers_and_heads_that_the_model_lacks_are_refused() -> None:
    config = SparseConfig.from_settings(
        {"default": SLASH, "layers": {3: {"heads": {9: {"pattern": "dense"}}}}, "dense_layers": [5]}
    )
    config.check_model(layers=6, heads=10)
    with pytest.raises(ValueError, match=r"layers: layer 3: the model has layers 0\.\.2"):
        config.check_model(layers=3, heads=10)
    with pytest.raises(ValueError, match=r"dense_layers: layer 5: the model has layers 0\.\.4"):
        config.check_model(layers=5, heads=10)
    with pytest.raises(ValueError, match=r"head 9: the model has query heads 0\.\.8"):
        config.check_model(layers=6, heads=9)


def test_shipped_configs_load() -> None:
    files = sorted(default_config().parent.rglob("*.yaml"))
    assert default_config() in files
    for path in files:
        SparseConfig.from_yaml(path)


def test_tensor_parallel_ranks_share_out_all_heads() -> None:
    assert [h for rank in range(4) for h in local_heads(28, rank, 4)] == list(range(28))
    for total, rank, size in ((28, 0, 3), (28, 4, 4), (28, 0, 0)):
        with pytest.raises(ValueError, match="needs"):
            local_heads(total, rank, size)
