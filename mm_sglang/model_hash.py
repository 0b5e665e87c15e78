"""Which model a searched configuration is for."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mm_sglang.config import SparseConfig


def model_hash(model: str) -> str:
    """Of config.json and the sizes and names of the weights: enough to tell models apart, quick on any size."""
    folder, digest = Path(model), hashlib.sha256()
    if folder.is_dir():
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
    else:
        digest.update(model.encode())
    return digest.hexdigest()[:16]


def require_same_model(config: SparseConfig, model: str) -> None:
    """ValueError if the settings were searched for another model; hand-written ones name none and fit all."""
    searched = config.provenance.get("model_hash")
    if searched is not None and searched != model_hash(model):
        raise ValueError(
            f"these settings were searched for model {config.provenance.get('model', '')!r} (hash {searched}), {model} "
            f"has {model_hash(model)}: needs a search of its own (mm-sglang search), or settings without model_hash"
        )
