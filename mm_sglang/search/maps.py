"""What the heads attend and what is computed of it, small enough for a report's pictures, on one prompt of a search.

Legend: H query heads, N tokens, C = CELLS cells a side, each of N / C tokens in a row (in the permuted order).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mm_sglang.config import TEXT_TAIL
from mm_sglang.kernels.inspection import density, tile_map
from mm_sglang.kernels.layout import IMAGE, VIDEO, TokenLayout
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.plan import PAD, TILE, HeadGroup
from mm_sglang.kernels.prefill import make_plan, sparse_prefill
from mm_sglang.search.exact import Exact

CELLS = 64
SAMPLES = 4  # queries that stand for a cell
FLOOR = 4  # decades under 1 that a byte of attention spans
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the budgets, for the curve
KINDS = ("attention", "tiles", "attention after permutation", "tiles after permutation")
NAMES = {IMAGE: "image", VIDEO: "video"}
HEADS_A_FAMILY = 2  # that a report shows
Bytes = npt.NDArray[np.uint8]


def shown_heads(told: Mapping[int, Mapping[int, Mapping[str, Any]]]) -> list[tuple[int, int]]:
    """(layer, head) of those that a report shows: of each family the heads of least and of most recall."""
    families: dict[str, list[tuple[float, int, int]]] = {}
    for layer, heads in told.items():
        for head, cell in heads.items():
            families.setdefault(str(cell["family"]), []).append((float(cell["recall"]), layer, head))
    shown: list[tuple[int, int]] = []
    for found in families.values():
        ordered = sorted(found)
        ends = ordered if len(ordered) <= HEADS_A_FAMILY else [ordered[0], ordered[-1]]
        shown += [(layer, head) for _, layer, head in ends]
    return shown


def layer_maps(
    q: torch.Tensor, k: torch.Tensor, layout: TokenLayout, patterns: Sequence[HeadPattern], scale: float, engine: Any,
    heads: Sequence[int],
) -> Bytes:  # fmt: skip
    """uint8 [heads, len(KINDS), C, C], queries down: attention is the logarithm of a cell's share of its rows' mass."""
    out = np.zeros((len(heads), len(KINDS), CELLS, CELLS), np.uint8)
    if not heads:
        return out
    plan = make_plan(q, k, layout=layout, patterns=patterns, scale=scale, ops=engine.ops(), tail=TEXT_TAIL)
    for place, head in enumerate(heads):
        groups = [group for group in plan.groups if any(head in row for row in group.heads)]
        main = max(groups, key=lambda group: group.query_tiles)
        prompt = torch.arange(len(q), device=q.device)
        queries, keys = (_order(main, head, of) for of in ("q", "k"))
        out[place, 0] = _attention(q, k, head, prompt, prompt, scale)
        out[place, 1] = _tiles(groups, head, len(q))
        out[place, 2] = _attention(q, k, head, queries.to(q.device), keys.to(q.device), scale)
        computed = (tile_map(main, head) > 0).float()[None, None]
        pooled = torch.nn.functional.adaptive_avg_pool2d(computed, (CELLS, CELLS))[0, 0]
        out[place, 3] = (pooled * 255).round().byte().numpy()
    return out


def _positions(group: HeadGroup, head: int, of: str) -> torch.Tensor:
    """int64 positions of a head's queries or keys in the plan's order, PAD where there is none, on the CPU."""
    row = next(r for r, heads in enumerate(group.heads) if head in heads)
    return (group.q_positions() if of == "q" else group.k_positions())[row].long().cpu()


def _order(group: HeadGroup, head: int, of: str) -> torch.Tensor:
    positions = _positions(group, head, of)
    return positions[positions != PAD]


def _attention(
    q: torch.Tensor, k: torch.Tensor, head: int, queries: torch.Tensor, keys: torch.Tensor, scale: float
) -> Bytes:
    """A head's dense attention, its queries and keys taken in these orders; uint8 [C, C]."""
    at = torch.arange(CELLS * SAMPLES, device=q.device) * len(queries) // (CELLS * SAMPLES)
    rows = queries[at]
    logits = q[rows, head].float() @ k[:, head // (q.shape[1] // k.shape[1])].float().T * scale
    seen = torch.arange(len(k), device=q.device)[None] <= rows[:, None]
    mass = logits.masked_fill(~seen, float("-inf")).softmax(1)[:, keys]
    cell = torch.arange(len(keys), device=q.device) * CELLS // len(keys)
    pooled = torch.zeros(len(rows), CELLS, device=q.device).index_add_(1, cell, mass)
    share = pooled.view(CELLS, SAMPLES, CELLS).mean(1).clamp(min=1e-9)
    return ((share.log10() / FLOOR + 1).clamp(0, 1) * 255).round().byte().cpu().numpy()


def _tiles(groups: Sequence[HeadGroup], head: int, tokens: int) -> Bytes:
    """Share of a cell's pairs of query and key that is computed, in the prompt's order; uint8 [C, C]."""
    total = torch.zeros(CELLS, CELLS)
    for group in groups:
        sides = []
        for of in ("q", "k"):
            positions = _positions(group, head, of)
            cells = torch.where(positions == PAD, 0, positions * CELLS // tokens)
            held = torch.zeros(len(positions) // TILE, CELLS)
            tile = torch.arange(len(positions)) // TILE
            sides.append(held.index_put_((tile, cells), (positions != PAD).float(), accumulate=True))
        total += sides[0].T @ (tile_map(group, head) > 0).float() @ sides[1]
    size = torch.bincount(torch.arange(tokens) * CELLS // tokens, minlength=CELLS).float()
    return ((total / size[:, None] / size[None]).clamp(max=1) * 255).round().byte().numpy()


def layer_curve(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout, patterns: Sequence[HeadPattern],
    scale: float, engine: Any,
) -> list[list[float]]:  # fmt: skip
    """For each of FACTORS on all budgets: density, recall, squared error and squared norm of the output."""
    exact = Exact(q, k, v, scale, engine.ops())
    norm, points = float(exact.norm().sum()), []
    for factor in FACTORS:
        scaled = [pattern.scaled(factor) for pattern in patterns]
        out, lse, plan = sparse_prefill(
            q, k, v, layout=layout, patterns=scaled, scale=scale, engine=engine, tail=TEXT_TAIL
        )
        points.append([density(plan), float(exact.recall(lse).mean()), float(exact.error(out).sum()), norm])
    return points


def maps_file(config: Path) -> Path:
    """Where the maps of a searched configuration lie."""
    return config.with_suffix(".maps.npz")


def write_maps(
    config: Path, maps: Mapping[tuple[int, int], Bytes], curves: Sequence[list[list[float]]], layout: TokenLayout
) -> None:
    """Store maps by layer and head, the curve over all layers and where the prompt's items lie; never half a file."""
    points = np.asarray(curves)  # [layers, factors, 4]
    error = np.sqrt(points[:, :, 2].sum(0) / points[:, :, 3].sum(0))
    curve = np.stack([points[:, :, 0].mean(0), points[:, :, 1].mean(0), error], 1)
    spans = [[NAMES[item.modality], *span] for item in layout.items for span in item.spans]
    frames = [int(at) for item in layout.items for at in item.positions()[:: item.frame_tokens]]
    told = json.dumps({"tokens": layout.length, "spans": spans, "frames": frames})
    arrays: dict[str, Any] = {f"{layer} {head}": one for (layer, head), one in maps.items()}
    path = maps_file(config)
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:  # a name of its own would get another ending from numpy
        np.savez_compressed(file, told=np.array(told), curve=curve, **arrays)
    os.replace(scratch, path)


def read_maps(path: Path) -> tuple[dict[str, Any], npt.NDArray[np.float64], dict[tuple[int, int], Bytes]]:
    """What `write_maps` stored: the prompt's items, the curve, and maps by layer and head.

    Raises:
        ValueError: a file that is none of its.
    """
    try:
        with np.load(path) as stored:
            told, curve = json.loads(str(stored["told"])), stored["curve"]
            names = [tuple(int(n) for n in name.split()) for name in stored.files if name[0].isdigit()]
            maps = {(layer, head): stored[f"{layer} {head}"] for layer, head in names}
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: no maps of a search ({reason}): delete it, or search again") from error
    return told, curve, maps
