"""The demo's needles are the frames that the model was trained on, and the video has them at their times."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.tiny_model import plans, scenes
from benchmarks.tiny_model.tasks import make_plan
from benchmarks.tiny_model.words import COLOURS, GLYPHS
from mm_sglang.demo.client import Reply
from mm_sglang.demo.needles import COLOUR_VALUES, FONT, NEEDLE_S, Needle, drawn, glyph_box, hide, question
from mm_sglang.demo.questions import Question, compare, time_to_first_token
from mm_sglang.demo.tables import print_questions
from mm_sglang.demo.trained import trained_model
from mm_sglang.demo.video import render_video, scene_frames


@pytest.mark.parametrize(("high", "wide"), [(336, 336), (112, 252)])
def test_a_needle_is_drawn_as_in_training(high: int, wide: int) -> None:
    class Middle(random.Random):
        def uniform(self, a: float, b: float) -> float:
            return (a + b) / 2

    for colour, glyph in zip(itertools.cycle(COLOURS), GLYPHS, strict=False):
        clip = scenes.new_clip(2, high, wide, 1.0, random.Random(0), "test")
        background = scenes.render([clip], "cpu", photographs=False)[0].permute(1, 2, 0).numpy()
        plans.needle(clip, 0, colour, glyph, Middle())
        trained = scenes.render([clip], "cpu", photographs=False)
        ours = drawn(background, Needle(second=0.0, colour=colour, glyph=glyph))
        assert torch.equal(trained[0], torch.from_numpy(ours).permute(2, 0, 1)), (colour, glyph)
        assert (ours != background).any(2).mean() > 0.3  # the border and the plate do cover the photograph


def test_the_question_is_the_training_s() -> None:
    turns = make_plan("v_niah", tokens=640, seed=8, split="test", turns=6).turns
    assert {asked for asked, _ in turns} <= {question(colour) for colour in COLOURS}
    assert all(truth in FONT for _, truth in turns)


def test_the_video_shows_each_needle_for_its_time_and_photographs_otherwise(tmp_path: Path) -> None:
    import av

    needles = (Needle(second=3.0, colour="cyan", glyph="K"), Needle(second=0.5, colour="red", glyph="4"))
    path = render_video(tmp_path / "v.mp4", seconds=6.0, fps=4, width=224, height=168, needles=needles).path
    with av.open(str(path)) as container:
        frames = [
            frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(container.streams.video[0])
        ]
    assert len(frames) == 24
    for number, (frame, photograph) in enumerate(zip(frames, scene_frames(24, 4, 224, 168, 0), strict=True)):
        shown = [n for n in needles if n.second <= number / 4 < n.second + NEEDLE_S]
        assert len(shown) == (2 <= number < 10 or 12 <= number < 20)
        wanted = drawn(photograph, shown[0]) if shown else photograph
        assert np.abs(frame - wanted).mean() < 12, number  # H.264 loses a little
        if shown:
            border = frame[:10].reshape(-1, 3).mean(0)
            assert np.abs(border - COLOUR_VALUES[shown[0].colour]).max() < 25, number
            x, y, w, h = glyph_box(224, 168)
            assert (
                (frame[y : y + h, x : x + w].min(2) > 128) == (wanted[y : y + h, x : x + w] == 255).all(2)
            ).mean() > 0.95


def test_hidden_needles_differ_and_keep_apart() -> None:
    assert hide(5, seconds=64.0, seed=1) == hide(5, seconds=64.0, seed=1) != hide(5, seconds=64.0, seed=2)
    for seed in range(50):
        needles = hide(8, seconds=24.0, seed=seed)
        assert len({n.colour for n in needles}) == len({n.glyph for n in needles}) == 8
        begins = [n.second for n in needles]
        ends = [*begins[1:], 24.0]
        assert all(begin >= 0 and begin + NEEDLE_S <= end + 1e-9 for begin, end in zip(begins, ends, strict=True))


def test_wrong_needles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="colour='pink': needs one of red, green"):
        Needle(second=0.0, colour="pink", glyph="A")
    with pytest.raises(ValueError, match="glyph='B': needs one of 0, 1"):
        Needle(second=0.0, colour="red", glyph="B")
    with pytest.raises(ValueError, match="count=9: needs 1 to 8"):
        hide(9, seconds=64.0, seed=0)
    with pytest.raises(ValueError, match=r"count=8, seconds=15.0: needs 2.0 s for each"):
        hide(8, seconds=15.0, seed=0)
    for seconds in ((-0.1,), (2.1,), (0.0, 1.9), (float("nan"),)):
        needles = [Needle(second=second, colour="red", glyph="A") for second in seconds]
        with pytest.raises(ValueError, match=r"needles at .* s: needs 2.0 s for each within 4.0 s"):
            render_video(tmp_path / "v.mp4", seconds=4.0, needles=needles)
    assert not list(tmp_path.iterdir())


def test_right_and_wrong_are_counted_from_the_answers(capsys: pytest.CaptureFixture[str]) -> None:
    def replies(*texts: str) -> list[Reply]:
        return [Reply(text=text, first_token_s=second, prompt_tokens=9) for second, text in enumerate(texts, 1)]

    given = {"dense": replies("A", "7", "A"), "mm_sparse": replies("A", "1", "A")}
    rows = compare([Question(text="one?", truth="A"), Question(text="two?", truth="7")], given)
    assert [row["right"] for row in rows] == [{"dense": True, "mm_sparse": True}, {"dense": True, "mm_sparse": False}]
    print_questions(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["two?", "7", "7", "right", "1", "wrong"]
    assert lines[-1].split() == ["right", "2", "of", "2", "1", "of", "2"]
    assert time_to_first_token(given["dense"]) == {"first": 1, "repeat": 2.5}
    own = compare([Question(text="what?")], given)
    assert own[0]["right"] == {"dense": None, "mm_sparse": None}
    print_questions(own)
    assert "words.py" in capsys.readouterr().out


def test_missing_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_sglang.demo.trained.FOLDER", tmp_path)
    with pytest.raises(ValueError, match="model.safetensors.index.json: missing"):
        trained_model()
    parts = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = {"weight_map": {"a": parts[0], "b": parts[1], "c": parts[2], "d": parts[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / parts[0]).touch()
    with pytest.raises(ValueError, match=f": {parts[1]}, {parts[2]} missing"):
        trained_model()
    for part in parts[1:]:
        (tmp_path / part).touch()
    assert trained_model() == tmp_path
