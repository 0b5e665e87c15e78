"""The trained model that ships with the package: a Qwen2.5-VL of 12 million parameters.

benchmarks/tiny_model made it; benchmarks/tiny_model/words.py has every word that it knows.
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "model"


def trained_model() -> Path:
    """Its folder. ValueError if weights are missing there."""
    index = FOLDER / "model.safetensors.index.json"
    if not index.is_file():
        raise ValueError(f"{index}: missing; needs the package's own files")
    parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [part for part in parts if not (FOLDER / part).is_file()]
    if missing:
        raise ValueError(f"{FOLDER}: {', '.join(missing)} missing; needs the package's own files")
    return FOLDER
