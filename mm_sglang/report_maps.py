"""The report's pictures: what heads attend, with the tiles computed over it, and what budgets buy."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mm_sglang.search.maps import CELLS, FACTORS, KINDS, maps_file, read_maps

SIDE = 5  # pixels of a cell
TINT = np.array([242, 142, 43])
BOUNDARY, FRAME = np.array([40, 90, 200]), np.array([170, 190, 230])


def pictures(config: Path, layers: Mapping[int, Mapping[int, Mapping[str, Any]]]) -> str:
    """HTML of the maps beside a searched configuration; nothing if there are none."""
    path = maps_file(config)
    if not path.is_file():
        return ""
    told, curve, maps = read_maps(path)
    try:
        shown = [_head(layer, head, layers[layer][head], one, told) for (layer, head), one in maps.items()]
    except KeyError as error:
        raise ValueError(f"{path}: of other heads than {config}: delete it, or search again") from error
    legend = (
        f"<p>The longest prompt of the search, {told['tokens']} tokens, queries downwards, keys to the right. Dark: "
        f"attention (logarithmic). Orange: computed. Lines: where images and videos begin and end, and their frames. "
        f"Right: the same after the head's permutation. For each pattern the head of least and of most recall.</p>"
    )
    return f"<h2>Attention and tiles</h2>{legend}{''.join(shown)}<h2>What budgets buy</h2>{_curve(curve)}"


def _head(layer: int, head: int, cell: Mapping[str, Any], maps: npt.NDArray[np.uint8], told: Mapping[str, Any]) -> str:
    before, tiles, after, moved = (maps[KINDS.index(kind)] for kind in KINDS)
    left, right = _image(before, tiles, told), _image(after, moved, None)
    text = f"layer {layer} head {head}: {cell['family']}, recall {cell['recall']}, density {cell['density']}"
    return f"<figure>{left} {right}<figcaption>{html.escape(text)}</figcaption></figure>"


def _image(attention: npt.NDArray[np.uint8], tiles: npt.NDArray[np.uint8], told: Mapping[str, Any] | None) -> str:
    """A PNG in the page itself; with `told` the lines of items and frames."""
    from PIL import Image

    grey = 255 - np.kron(attention, np.ones((SIDE, SIDE)))[..., None] * np.ones(3)
    share = np.kron(tiles, np.ones((SIDE, SIDE)))[..., None] / 255 * 0.45
    picture = grey * (1 - share) + TINT * share
    if told is not None:
        cells = CELLS * SIDE / told["tokens"]
        if len(told["frames"]) * 3 < CELLS:
            for at in told["frames"]:
                picture[int(at * cells), :] = picture[:, int(at * cells)] = FRAME
        for _, start, end in told["spans"]:
            for at in (start, end):
                place = min(int(at * cells), CELLS * SIDE - 1)
                picture[place, :] = picture[:, place] = BOUNDARY
    out = io.BytesIO()
    Image.fromarray(picture.round().astype(np.uint8)).save(out, "PNG", optimize=True)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'


def _curve(curve: npt.NDArray[np.float64]) -> str:
    """Recall and error of the output over density, all heads together, budgets times FACTORS; an SVG."""
    wide, high, edge = 460, 240, 40
    low, top = (math.log10(max(float(x), 1e-5)) for x in (curve[:, 0].min(), curve[:, 0].max()))

    def at(density: float, value: float) -> str:
        x = edge + (wide - 2 * edge) * (math.log10(max(density, 1e-5)) - low) / max(top - low, 1e-9)
        return f"{x:.1f},{high - edge - (high - 2 * edge) * min(value, 1.0):.1f}"

    box = f'x="{edge}" y="{edge}" width="{wide - 2 * edge}" height="{high - 2 * edge}"'
    parts = [f'<rect {box} fill="none" stroke="#bbb"/>']
    for column, colour, name in ((1, "#4c78a8", "recall"), (2, "#e45756", "error of the output")):
        points = " ".join(at(float(row[0]), float(row[column])) for row in curve)
        x, y = at(float(curve[-1, 0]), float(curve[-1, column])).split(",")
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{float(x) - 4}" y="{float(y) - 6}" fill="{colour}" text-anchor="end">{name}</text>')
    small, last = 'font-size="10"', -1e9
    for row, factor in zip(curve, FACTORS, strict=True):
        x, _ = at(float(row[0]), 0.0).split(",")
        if float(x) - last < 34:  # no room for its label: budgets at a pattern's fixed least
            continue
        last = float(x)
        parts.append(f'<text x="{x}" y="{high - edge + 16}" text-anchor="middle" {small}>{row[0]:.1%}</text>')
        parts.append(f'<text x="{x}" y="{high - edge + 30}" text-anchor="middle" {small}>x{factor:g}</text>')
    for value in (0.0, 0.5, 1.0):
        y = f"{high - edge - (high - 2 * edge) * value + 4:.0f}"
        parts.append(f'<text x="{edge - 6}" y="{y}" text-anchor="end" {small}>{value:g}</text>')
    return (
        f"<p>Over density (share of dense attention's tiles), all budgets multiplied.</p>"
        f'<svg width="{wide}" height="{high}" font-size="12">{"".join(parts)}</svg>'
    )
