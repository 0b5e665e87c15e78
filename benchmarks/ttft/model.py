"""A folder that SGLang loads with --load-format dummy: Qwen2.5-VL-7B's shape, any number of layers, no weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from mm_sglang.demo.tiny_model import make_tiny_model

LAYERS = 28
TEXT = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "head_dim": 128, "vocab_size": 152064,
}  # fmt: skip
VISION = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip


def make_model(folder: Path, *, layers: int, positions: int) -> Path:
    """Write config, tokenizer and processor files into the new folder `folder`; returns it."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny = make_tiny_model(Path(scratch) / "tiny", layers=1, max_positions=positions)
        shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors*", "mm_sglang_tiny.json"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text.update(TEXT, num_hidden_layers=layers, max_window_layers=layers, layer_types=["full_attention"] * layers)
    text["rope_parameters"] |= {"mrope_section": [16, 24, 24]}
    config["vision_config"].update(VISION)
    config["torch_dtype"] = config["dtype"] = text["dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=1))
    return folder
