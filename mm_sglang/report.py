"""`mm-sglang report`: one HTML page of a searched configuration, for a person to look at; needs no network."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_sglang.config import SparseConfig
from mm_sglang.report_maps import pictures
from mm_sglang.search.candidates import FAMILIES
from mm_sglang.settings_file import write_whole

# One colour a family, kin near each other: slashes blue, grids red to yellow.
COLOURS = {
    "a_shape": "#8c8c8c", "vertical_slash": "#4c78a8", "columns": "#72b7b2", "grid frame": "#e45756",
    "grid frame, both lines": "#f58518", "grid row": "#d4a72c", "block_topk": "#54a24b",
    "columns and blocks": "#2f6b4f", "k vertical_slash": "#7da7d9", "q vertical_slash": "#3a5ba0",
    "q grid frame": "#c2607f", "2d vertical_slash": "#b279a2",
}  # fmt: skip
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }
table.map { border-collapse: separate; border-spacing: 2px; }
table.map td { width: 1.7em; height: 1.7em; text-align: center; font-size: 11px; color: #fff; border-radius: 3px; }
table.map th { font-weight: normal; font-size: 11px; color: #666; }
.legend span { display: inline-block; margin: 0 1em .4em 0; }
.legend i { display: inline-block; width: 1em; height: 1em; border-radius: 3px; margin-right: .4em; }
table.plain { border-collapse: collapse; margin-top: 1em; }
table.plain td, table.plain th { padding: .2em 1em .2em 0; text-align: right; border-bottom: 1px solid #ddd; }
table.plain td:first-child, table.plain th:first-child { text-align: left; }
.scroll { overflow-x: auto; }
figure { display: inline-block; margin: 0 1.5em 1em 0; }
figcaption { font-size: 12px; color: #666; }
"""
SHADES = {  # measure -> (title, what a darker cell means)
    "recall": ("Attention recall", "darker: less of the dense softmax attended"),
    "error": ("Error of the output", "darker: further from dense attention"),
    "density": ("Density", "darker: more tiles computed"),
}


def report(config: Path, out: Path) -> None:
    """Write the page for a file that `mm-sglang search` made.

    Raises:
        ValueError: settings that no search wrote, since they say nothing of their heads, or maps that are none.
    """
    told = SparseConfig.from_yaml(config).provenance
    layers = _told_layers(config, told)
    body = [f"<h1>{html.escape(str(told.get('model', config.stem)))}</h1>", _summary(told, layers), _families(layers)]
    body += [_shaded(layers, measure) for measure in SHADES]
    body.append(pictures(config, layers))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(config.name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>"
    )
    write_whole(out, page)


def _told_layers(config: Path, told: Mapping[str, Any]) -> Layers:
    """Figures by layer and head; ValueError if anything that the page shows is missing."""
    missing = [name for name in ("heads", "videos", "tokens", "density") if not told.get(name)]
    if missing:
        raise ValueError(
            f"{config}: holds no {' and no '.join(missing)} in its provenance: needs a file that mm-sglang search "
            "has written"
        )
    try:
        layers = {int(layer): {int(h): cell for h, cell in cells.items()} for layer, cells in told["heads"].items()}
        every = [
            (cell["family"], *(float(cell[name]) for name in SHADES)) for c in layers.values() for cell in c.values()
        ]
        float(told["density"]), list(zip(told["videos"], told["tokens"], strict=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{config}: provenance is not as mm-sglang search writes it ({error!r})") from error
    unknown = {str(family) for family, *_ in every} - set(FAMILIES)
    if unknown:
        raise ValueError(f"{config}: unknown family {sorted(unknown)[0]!r}: needs one of {tuple(FAMILIES)}")
    return layers


Layers = Mapping[int, Mapping[int, Mapping[str, Any]]]


def _summary(told: Mapping[str, Any], layers: Layers) -> str:
    cells = [cell for heads in layers.values() for cell in heads.values()]
    mean = {name: sum(cell[name] for cell in cells) / len(cells) for name in SHADES}
    videos = ", ".join(
        f"{html.escape(str(name))} ({count} tokens)" for name, count in zip(told["videos"], told["tokens"], strict=True)
    )
    dear = ", ".join(html.escape(str(name)) for name in told.get("too_dear", ()))
    note = f"<p>Cost more than that even at their least, so could not be chosen: {dear}.</p>" if dear else ""
    return (
        f"<p>{len(layers)} layers of {len(cells) // len(layers)} heads, searched on {videos} at a density of "
        f"{told['density']:.0%} of dense attention's tiles.</p>"
        f"<p>Means over all heads: recall <b>{mean['recall']:.3f}</b>, error of the output <b>{mean['error']:.3f}</b>, "
        f"density <b>{mean['density']:.1%}</b>.</p>"
        f"{note}"
    )


def _families(layers: Layers) -> str:
    """The map of chosen patterns, its legend, and a table of what each family gave where it was chosen."""
    cells = [cell for heads in layers.values() for cell in heads.values()]
    number = Counter(cell["family"] for cell in cells)
    legend = "".join(f'<span><i style="background:{COLOURS[f]}"></i>{f}</span>' for f in FAMILIES if number[f])
    lines = []
    for family, count in number.most_common():
        own = [cell for cell in cells if cell["family"] == family]
        means = "".join(f"<td>{sum(c[name] for c in own) / count:.3f}</td>" for name in SHADES)
        lines.append(f"<tr><td>{family}</td><td>{count}</td>{means}</tr>")
    head = "<tr><th>pattern</th><th>heads</th>" + "".join(f"<th>{name}</th>" for name in SHADES) + "</tr>"
    return (
        f'<h2>Chosen patterns</h2><p class="legend">{legend}</p>'
        + _map(layers, lambda cell: (COLOURS[cell["family"]], ""))
        + f'<table class="plain">{head}{"".join(lines)}</table>'
    )


def _shaded(layers: Layers, measure: str) -> str:
    title, meaning = SHADES[measure]
    every = [float(cell[measure]) for heads in layers.values() for cell in heads.values()]
    light, dark = (max(every), min(every)) if measure == "recall" else (min(every), max(every))

    def cell(values: Mapping[str, Any]) -> tuple[str, str]:
        value = float(values[measure])
        share = (value - light) / (dark - light) if dark != light else 0.0
        return f"hsl(215 45% {66 - 44 * share:.0f}%)", f"{value * 100:.0f}"

    return f"<h2>{title}</h2><p>In per cent; {meaning}.</p>" + _map(layers, cell)


def _map(layers: Layers, look: Any) -> str:
    """Layers down, heads across; pointing at a cell shows everything that is known of it."""
    heads = sorted({head for cells in layers.values() for head in cells})
    rows = ["<tr><th>layer, head</th>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for layer in sorted(layers):
        line = [f"<tr><th>{layer}</th>"]
        for head in heads:
            values = layers[layer].get(head)
            if values is None:
                line.append("<td></td>")
                continue
            colour, text = look(values)
            known = f"layer {layer} head {head}: " + ", ".join(f"{name} {values[name]}" for name in ("family", *SHADES))
            line.append(f'<td style="background:{colour}" title="{html.escape(known)}">{text}</td>')
        rows.append("".join(line) + "</tr>")
    return f'<div class="scroll"><table class="map">{"".join(rows)}</table></div>'
