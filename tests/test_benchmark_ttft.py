"""benchmarks.ttft without a GPU: the model folder, the settings, the table of stored results, bad input."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from benchmarks.ttft import __main__ as ttft
from benchmarks.ttft.child import prompt
from benchmarks.ttft.model import LAYERS, make_model
from mm_sglang.config import SparseConfig
from mm_sglang.kernels.patterns import BlockTopK, Grid, VerticalSlash

STORED = Path(ttft.RESULTS) / "nvidia-h200" / "ttft.json"


def test_the_model_is_qwen_7bs_shape_with_other_layers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(make_model(tmp_path / "model", layers=3, positions=4096))
    text = config.text_config
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads) == (
        3,
        3584,
        28,
        4,
    )
    assert text.head_dim * text.num_attention_heads == text.hidden_size and config.vision_config.out_hidden_size == 3584
    assert not list((tmp_path / "model").glob("*.safetensors"))


@pytest.mark.parametrize("kind, kinds", [("mix", {BlockTopK, VerticalSlash, Grid}), ("paper", {VerticalSlash, Grid})])
def test_the_settings_are_the_kernel_benchmarks_recipes(kind: str, kinds: set[type]) -> None:
    config = SparseConfig.from_mapping(ttft.settings(kind))
    config.check_model(layers=LAYERS, heads=28)
    for layer in (0, LAYERS - 1):
        patterns = config.patterns(layer, 28)
        assert patterns is not None and {type(p) for p in patterns} == kinds
        assert all(patterns[h] == patterns[h // 7 * 7] for h in range(28))  # a KV head's heads share a kind
    assert config.assume_video is not None and config.guard is None


def test_contestants_differ_in_the_backend_alone(tmp_path: Path) -> None:
    options = argparse.Namespace(
        lengths=[4096], memory=0.7, only=["stock", "mm_sparse"], chunk=1024, layers=2, brief=True, mixed_chunk=True
    )
    stock, ours = (spec["arguments"] for spec in ttft.contestants(options, tmp_path))
    different = {key for key in {*stock, *ours} if stock.get(key) != ours.get(key)}
    assert different == {
        "prefill_attention_backend", "decode_attention_backend", "attention_backend", "json_model_override_args",
    }  # fmt: skip
    assert stock["enable_mixed_chunk"] is True
    assert set(json.loads(ours["json_model_override_args"])["mm_sparse"]["layers"]) == {"0", "1"}
    assert prompt(50, 1) == prompt(50, 1) != prompt(50, 2)


def test_the_stored_table_shows_the_ratio_to_stock() -> None:
    record = json.loads(STORED.read_text())
    runs = {run["name"]: {t["tokens"]: t["seconds"] for t in run["ttft"]} for run in record["runs"]}
    ratio = runs["stock"][1 << 20] / runs["mm_sparse"][1 << 20]
    row = next(line for line in ttft.table(record).splitlines() if "1024K" in line and "mm_sparse" in line)
    assert f"{ratio:.2f}x" in row


def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("asks for a machine without a GPU")
    monkeypatch.setattr("sys.argv", ["ttft"])
    with pytest.raises(SystemExit) as ended:
        ttft.main()
    assert ended.value.code == 2 and "no CUDA device" in capsys.readouterr().err
