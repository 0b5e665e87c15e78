"""Which model a searched configuration is for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from mm_sglang.config import SparseConfig

PIECES, PIECE = 4, 4096  # of a tensor, evenly spread: some 12 MB of a 7B's 16 GB, read in well under a second
MOST_HEADER = 100 << 20  # bytes, safetensors' own limit


def model_hash(model: str) -> str:
    """Of config.json, and of each tensor its name, shape and bytes in PIECES places.

    Training on moves every tensor, merging a LoRA whole ones, so pieces tell models apart; what is smaller than the
    pieces together is read whole. A name from a hub counts as the name.

    Raises:
        ValueError: a weights file that is not safetensors.
    """
    folder, digest = Path(model), hashlib.sha256()
    if folder.is_dir():
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(folder.glob("*.safetensors")):
            _add(file, digest)
    else:
        digest.update(model.encode())
    return digest.hexdigest()[:16]


def _add(file: Path, digest: hashlib._Hash) -> None:
    with file.open("rb") as held:
        size = int.from_bytes(held.read(8), "little")
        header = held.read(min(size, MOST_HEADER))
        try:
            tensors = {
                name: told["data_offsets"] for name, told in json.loads(header).items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: no safetensors file ({' '.join(str(error).split())[:100]})") from error
        digest.update(header)
        for name in sorted(tensors):
            first, last = (8 + size + at for at in tensors[name])
            steps = PIECES if last - first > PIECES * PIECE else 1
            for step in range(steps):
                at = first + (last - first - PIECE) * step // (PIECES - 1) if steps > 1 else first
                digest.update(os.pread(held.fileno(), PIECE if steps > 1 else last - first, at))


def require_same_model(config: SparseConfig, model: str) -> None:
    """ValueError if the settings were searched for another model; hand-written ones name none and fit all."""
    searched = config.provenance.get("model_hash")
    if searched is not None and searched != model_hash(model):
        raise ValueError(
            f"these settings were searched for model {config.provenance.get('model', '')!r} (hash {searched}), {model} "
            f"has {model_hash(model)}: needs a search of its own (mm-sglang search), or settings without model_hash"
        )
