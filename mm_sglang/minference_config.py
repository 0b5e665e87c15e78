"""Head configurations of MInference (minference/configs/*.json), turned into ours.

There: a list over layers of {"head": [type, a, b, score]}; "vertical_and_slash" with a columns and b slashes,
"stream_llm" with a first and b nearest tokens, "block_sparse" with the a best blocks of 64 keys for 64 queries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm_sglang.config import SparseConfig
from mm_sglang.kernels.plan import TILE
from mm_sglang.settings_file import settings_of, write_settings

BLOCK = 64  # of MInference's block_sparse
TYPES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "vertical_and_slash": lambda a, b: {"pattern": "vertical_slash", "columns": a, "slashes": b},
    "stream_llm": lambda a, b: {"pattern": "a_shape", "sink": a, "local": b},
    "block_sparse": lambda a, b: {"pattern": "block_topk", "blocks": max(1, -(-a * BLOCK // TILE))},
}


def convert(source: Path, out: Path) -> None:
    """Write `out` (YAML for --sparse-config) from MInference's `source`.

    Raises:
        ValueError: a file that is missing, no JSON, or not of that form; names layer and head.
    """
    try:
        layers = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: {' '.join(str(error).split())}") from error
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) and layer for layer in layers):
        raise ValueError(f"{source}: needs a list of layers, each a mapping of heads")
    made = {}
    for number, layer in enumerate(layers):
        heads = {int(h): _recipe(entry, f"{source}: layer {number} head {h}") for h, entry in layer.items()}
        made[number] = {"heads": heads}
    content = settings_of(made, {"source": f"MInference, {source.name}"})
    SparseConfig.from_mapping(content)
    write_settings(out, content)


def _recipe(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, list) or len(entry) < 3 or entry[0] not in TYPES:
        raise ValueError(f"{where}: {entry!r}: needs [type, number, number, …] with a type of {tuple(TYPES)}")
    if not all(isinstance(n, int) and n >= 0 for n in entry[1:3]):
        raise ValueError(f"{where}: {entry!r}: needs whole numbers from 0")
    recipe = TYPES[entry[0]](entry[1], entry[2])
    for name in ("columns", "slashes", "local"):
        if name in recipe:
            recipe[name] = max(1, recipe[name])
    return recipe
