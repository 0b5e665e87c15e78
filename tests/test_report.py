"""mm-sglang report: the page holds every head's figures and needs no network."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mm_sglang.cli import main
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.layout import VIDEO, TokenLayout, VisionItem
from mm_sglang.kernels.patterns import head_pattern
from mm_sglang.search.maps import CELLS, layer_curve, layer_maps, maps_file, shown_heads, write_maps


def write(path: Path, **changes: Any) -> Path:
    cell = {"family": "grid frame", "error": 0.123, "recall": 0.9, "density": 0.08}
    heads = {0: {0: cell, 1: cell | {"family": "2d vertical_slash", "recall": 0.4}}, 1: {0: cell, 1: cell}}
    told = {"model": "a <b>", "videos": ["x.mp4"], "tokens": [4000], "density": 0.1, "heads": heads} | changes
    path.write_text(yaml.safe_dump({"default": {"pattern": "dense"}, "provenance": told}))
    return path


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.titles: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.titles += [value for name, value in attrs if name == "title" and value]
        self.links += [value for name, value in attrs if name in ("src", "href") and value]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_every_head(tmp_path: Path) -> None:
    config = write(tmp_path / "x.yaml", too_dear=["block_topk"])
    assert main(["report", str(config)]) == 0
    text = (tmp_path / "x.html").read_text()
    page = Page(text)
    assert not page.open and not page.links and "http" not in text
    assert len(page.titles) == 4 * 4  # four heads on four maps
    assert "layer 0 head 1: family 2d vertical_slash, recall 0.4, error 0.123, density 0.08" in page.titles
    assert "could not be chosen: block_topk." in text
    assert "a &lt;b&gt;" in text and "<td>grid frame</td><td>3</td>" in text and "recall <b>0.775</b>" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": {}}, "holds no heads in its provenance: needs a file that mm-sglang search has written"),
        ({"videos": None, "tokens": None}, "holds no videos and no tokens in its provenance"),
        ({"heads": {0: {0: {"family": "a_shape", "error": 0.1, "density": 0.1}}}}, "KeyError('recall')"),
        ({"tokens": [1, 2]}, "provenance is not as mm-sglang search writes it"),
        ({"heads": {0: {0: {"family": "zigzag", "error": 0, "recall": 0, "density": 0}}}}, "unknown family 'zigzag'"),
    ],
)
def test_what_no_search_wrote_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "x.yaml", **changes)
    assert main(["report", str(config)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_maps_show_attention_and_the_tiles_over_it(tmp_path: Path) -> None:
    tokens, heads = 1024, 2
    q, k, v = (torch.randn(tokens, n, 64, generator=torch.Generator().manual_seed(n)) for n in (heads, 1, 1))
    k[300] *= 0.0
    k[300] += q[:, 0].mean(0) * 200  # head 0's queries look at position 300 where they can
    layout = TokenLayout(
        items=(VisionItem(modality=VIDEO, frames=8, rows=8, cols=8, spans=((100, 612),)),), length=tokens
    )
    grid = {"pattern": "grid", "lines": 1, "stride": "frame", "horizontal": False, "text": False}
    patterns = [head_pattern(grid | {"sink": 128, "local": 128}), head_pattern({"pattern": "dense"})]
    maps = layer_maps(q, k, layout, patterns, 0.125, engine("reference"), range(heads))
    assert maps.shape == (heads, 4, CELLS, CELLS)
    lower = torch.ones(CELLS, CELLS).tril(-8).bool().numpy()
    assert (maps[1, 1][lower] == 255).all() and (
        maps[1, 1][~lower.T & ~lower] >= 0
    ).all()  # dense: all under the diagonal
    assert maps[1, 1][0, -1] == 0 and maps[1, 0][0, -1] == 0  # nobody looks ahead
    density = maps[0, 1][lower].mean() / 255
    assert 0.05 < density < 0.9 and maps[0, 3].mean() > 0
    share = 10.0 ** ((maps[1, 0].astype(float) / 255 - 1) * 4)
    assert abs(share[-1].sum() - 1) < 0.1  # a row's shares, as far as a byte of logarithm tells
    curve = layer_curve(q, k, v, layout, patterns, 0.125, engine("reference"))
    assert [p[0] for p in curve] == sorted(p[0] for p in curve) and curve[-1][1] >= curve[0][1]

    config = write(tmp_path / "x.yaml")
    shown = shown_heads(yaml.safe_load(config.read_text())["provenance"]["heads"])
    write_maps(config, {(layer, head): maps[head] for layer, head in shown}, [curve, curve], layout)
    assert main(["report", str(config)]) == 0
    page = Page((tmp_path / "x.html").read_text())
    images = [link for link in page.links if link.startswith("data:image/png;base64,")]
    assert (
        len(shown) == 3 and len(images) == len(page.links) == 2 * 3
    )  # both grid heads of extremes and the only 2d one, before and after


def test_half_a_maps_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "x.yaml")
    maps_file(config).write_bytes(b"PK\x03\x04 and no more")
    assert main(["report", str(config)]) == 2
    said = capsys.readouterr().err
    assert "x.maps.npz: no maps of a search" in said and len(said.splitlines()) == 1
    assert main(["report", str(tmp_path / "missing.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_out_that_is_a_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(write(tmp_path / "x.yaml")), "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
