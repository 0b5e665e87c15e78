"""A long prompt in pieces: the same hidden states, and no piece larger than asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mm_sglang.demo.tiny_model import ARCHITECTURES, make_tiny_model
from mm_sglang.demo.video import render_video
from mm_sglang.search import bounded
from mm_sglang.search.capture import Captured


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pieces_give_the_whole(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = render_video(tmp_path / "a.mp4", seconds=6.0, width=224, height=168, seed=5).path
    held = Captured(str(make_tiny_model(tmp_path / "model", architecture=architecture, layers=2)), "cpu")
    inputs, layout = held.prompt(video, {})
    frame = int(inputs["video_grid_thw"][0, 1:].prod())
    whole = held.run(inputs, lambda *_: None)
    seen: dict[str, list[int]] = {"rows": [], "patches": []}

    def noted(what: str, module: Any, axis: int) -> None:
        # beneath the wrapper: what the module's own class is called with
        original = type(module).forward

        def forward(self: Any, x: torch.Tensor, **options: Any) -> Any:
            seen[what].append(x.shape[axis])
            return original(self, x, **options)

        monkeypatch.setattr(type(module), "forward", forward)

    noted("rows", held.model.model.language_model.layers[0].mlp, 1)
    noted("patches", held.model.model.visual, 0)
    held = Captured(held.folder, "cpu")
    monkeypatch.setattr(bounded, "ROWS", 100)
    monkeypatch.setattr(bounded, "PATCHES", frame * 5 // 2)
    pieces = held.run(inputs, lambda *_: None)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)
    assert layout.length > 300 and len(seen["rows"]) > 6 and max(seen["rows"]) == 100
    assert set(seen["patches"]) <= {2 * frame, frame} and sum(seen["patches"]) == len(inputs["pixel_values_videos"])
