"""mm-sglang report: the page holds every head's figures and needs no network."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm_sglang.cli import main


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
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_every_head(tmp_path: Path) -> None:
    config = write(tmp_path / "x.yaml")
    assert main(["report", str(config)]) == 0
    text = (tmp_path / "x.html").read_text()
    page = Page(text)
    assert not page.open and not page.links and "http" not in text
    assert len(page.titles) == 4 * 4  # four heads on four maps
    assert "layer 0 head 1: family 2d vertical_slash, recall 0.4, error 0.123, density 0.08" in page.titles
    assert "a &lt;b&gt;" in text and "<td>grid frame</td><td>3</td>" in text and "recall <b>0.775</b>" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": {}}, "holds no figures of its heads: needs a file that mm-sglang search has written"),
        ({"heads": {0: {0: {"family": "zigzag"}}}}, "unknown family 'zigzag'"),
    ],
)
def test_what_no_search_wrote_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "x.yaml", **changes)
    assert main(["report", str(config)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "x.html").exists()
