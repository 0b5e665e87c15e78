"""The demo's mp4 is a real video of moving photographs; its models are of the real classes and see what is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hf_reference import HuggingFace

from mm_sglang.demo.tiny_model import ARCHITECTURES, make_tiny_model
from mm_sglang.demo.video import PHOTOGRAPHS, render_video, scene_frames


def test_the_mp4_is_h264_and_moves(tmp_path: Path) -> None:
    import av
    from decord import VideoReader

    facts = render_video(tmp_path / "v.mp4", seconds=9.0, fps=8, width=224, height=168)
    assert facts.bytes == facts.path.stat().st_size and list(tmp_path.iterdir()) == [facts.path]
    with av.open(str(facts.path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.duration * stream.time_base == facts.seconds == 9.0
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
    assert len(frames) == facts.frames == 72 and frames[0].shape == (168, 224, 3)
    assert len(VideoReader(str(facts.path))) == 72  # the decoder that SGLang uses here
    data = facts.path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart
    steps = [float(np.abs(a - b).mean()) for a, b in zip(frames, frames[1:], strict=False)]
    assert min(steps[:50]) > 0.3 and max(steps[:50]) < 25  # moves in every frame, and never jumps as noise would
    assert float(np.abs(frames[0] - frames[-1]).mean()) > 25  # another photograph by then


def test_every_photograph_is_used_and_the_same_arguments_give_the_same_frames() -> None:
    first = [frame.mean() for frame in scene_frames(48, 1, 32, 24, seed=0)]
    assert first == [frame.mean() for frame in scene_frames(48, 1, 32, 24, seed=0)]
    assert len({round(float(mean)) for mean in first[::8]}) >= len(PHOTOGRAPHS)


def test_the_same_arguments_give_the_same_bytes_whatever_was_in_memory_before(tmp_path: Path) -> None:
    code = "import sys, pathlib, mm_sglang.demo.video as v; v.render_video(pathlib.Path(sys.argv[1]), seconds=4.0)"
    digests = set()
    for fill in ("0", "85", "170"):  # what glibc's malloc and free fill memory with
        path = tmp_path / f"{fill}.mp4"
        subprocess.run([sys.executable, "-c", code, path], check=True, env=os.environ | {"MALLOC_PERTURB_": fill})
        digests.add(sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_an_interrupted_video_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> Iterator[npt.NDArray[np.uint8]]:
        for number in range(100):  # x264 holds back the first ones, and without any there is no file yet
            yield np.full((168, 224, 3), number, np.uint8)
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt

    (tmp_path / "v.mp4").write_bytes(b"the one before")
    monkeypatch.setattr("mm_sglang.demo.video.scene_frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_video(tmp_path / "v.mp4", width=224, height=168)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("v.mp4", b"the one before")]


WRONG = [
    {"seconds": 0.0},
    {"seconds": float("nan")},
    {"seconds": float("inf")},
    {"fps": 0},
    {"width": 15},
    {"height": 33},
]


@pytest.mark.parametrize("wrong", WRONG)
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

    names = {file.name for file in folder.iterdir()}  # the files that the real repositories hold
    assert {"preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"} < names

    images = []
    for number, frame in enumerate(scene_frames(2, 1, 112, 112, seed=0)):
        images.append(tmp_path / f"{number}.png")
        Image.fromarray(np.rot90(frame, number).copy()).save(images[-1])
    model = HuggingFace(folder)
    answers = [model.greedy([("image", image), ("text", "what is it")], 6) for image in images]
    assert answers[0] != answers[1] and len(set(answers[0])) > 1
    videos = [render_video(tmp_path / f"{n}.mp4", seconds=2.0, width=224, height=168, seed=n).path for n in (1, 2)]
    answers = [model.greedy([("video", video), ("text", "what is it")], 8) for video in videos]
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
    for name in ("layers", "heads", "kv_heads", "head_dim", "max_positions"):
        with pytest.raises(ValueError, match=f"{name}=0: needs at least 1"):
            make_tiny_model(tmp_path / "m", **{name: 0})  # type: ignore[arg-type]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="needs a new or an empty folder"):
        make_tiny_model(tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_a_failure_half_way_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("mm_sglang.demo.tiny_model.save_processor", fails)
    with pytest.raises(OSError, match="no space"):
        make_tiny_model(tmp_path / "m", layers=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("architecture", "section"), [("qwen2_5_vl", [16, 24, 24]), ("qwen3_vl", [24, 20, 20])])
def test_rotary_sections_of_a_real_head_are_the_real_ones(
    tmp_path: Path, architecture: str, section: list[int]
) -> None:
    make_tiny_model(tmp_path / "m", architecture=architecture, layers=1, heads=2, kv_heads=1, head_dim=128)
    text = json.loads((tmp_path / "m" / "config.json").read_text())["text_config"]
    assert text["rope_parameters"]["mrope_section"] == section
