"""The demo's mp4 is a real video of moving photographs; its models are of the real classes and see what is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hf_reference import HuggingFace

from mm_sglang.demo.tiny_model import ARCHITECTURES, make_tiny_model
from mm_sglang.demo.video import PHOTOGRAPHS, render_video, scene_frames


def test_the_mp4_is_h264_and_moves(tmp_path: Path) -> None:
    import av

    facts = render_video(tmp_path / "v.mp4", seconds=9.0, fps=8, width=224, height=168)
    assert facts.bytes == facts.path.stat().st_size and list(tmp_path.iterdir()) == [facts.path]
    with av.open(str(facts.path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(frames) == facts.frames == 72 and frames[0].shape == (168, 224, 3)
    steps = [float(np.abs(a - b).mean()) for a, b in zip(frames, frames[1:], strict=False)]
    assert min(steps[:50]) > 0.3 and max(steps[:50]) < 25  # moves in every frame, and never jumps as noise would
    assert float(np.abs(frames[0] - frames[-1]).mean()) > 25  # another photograph by then


def test_every_photograph_is_used_and_the_same_arguments_give_the_same_frames() -> None:
    first = [frame.mean() for frame in scene_frames(48, 1, 32, 24, seed=0)]
    assert first == [frame.mean() for frame in scene_frames(48, 1, 32, 24, seed=0)]
    assert len({round(float(mean)) for mean in first[::8]}) >= len(PHOTOGRAPHS)


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"fps": 0}, {"width": 15}, {"height": 33}])
def test_wrong_video_arguments_are_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*needs"):
        render_video(tmp_path / "v.mp4", **wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_answer_by_what_they_see(tmp_path: Path, architecture: str) -> None:
    from PIL import Image

    folder = make_tiny_model(tmp_path / "model", architecture=architecture)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20 * 2**20
    written = (folder / "config.json").stat().st_mtime_ns
    assert make_tiny_model(folder, architecture=architecture) == folder  # the same again: left as it is
    assert (folder / "config.json").stat().st_mtime_ns == written

    images = []
    for number, frame in enumerate(scene_frames(2, 1, 112, 112, seed=0)):
        images.append(tmp_path / f"{number}.png")
        Image.fromarray(np.rot90(frame, number).copy()).save(images[-1])
    model = HuggingFace(folder)
    answers = [model.greedy([("image", image), ("text", "what is it")], 6) for image in images]
    assert answers[0] != answers[1] and len(set(answers[0])) > 1
    with torch.no_grad():  # the best token stands clear of the second, so that rounding does not decide parity
        best = model.model(**model.inputs([("text", "hello")])).logits[0, -1].topk(2).values
    assert float(best[0] - best[1]) > 1e-3


def test_other_arguments_make_another_model(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "m", layers=2)
    make_tiny_model(tmp_path / "m", layers=3)
    assert '"num_hidden_layers": 3' in (tmp_path / "m" / "config.json").read_text()
    with pytest.raises(ValueError, match=r"architecture='llama': needs one of .*qwen3_vl"):
        make_tiny_model(tmp_path / "m", architecture="llama")
    with pytest.raises(ValueError, match="needs a multiple"):
        make_tiny_model(tmp_path / "m", heads=3)
