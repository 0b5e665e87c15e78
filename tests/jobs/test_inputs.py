"""Keys of inputs: by content and by everything an answer depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_sglang.jobs.inputs import read_inputs, require_files


def test_keys_go_by_content(tmp_path: Path) -> None:
    for name, content in (("a", b"1"), ("copy of a", b"1"), ("b", b"2")):
        (tmp_path / name).write_bytes(content)
    inputs = read_inputs([tmp_path / "a", tmp_path / "copy of a", tmp_path / "b"], {"question": "?"})
    assert [each.video.name for each in inputs] == ["a", "b"]
    other = read_inputs([tmp_path / "a"], {"question": "!"})
    assert other[0].key not in {each.key for each in inputs}
    assert read_inputs([tmp_path / "copy of a"], {"question": "?"})[0].key == inputs[0].key


def test_a_video_that_changes_or_vanishes_is_noticed(tmp_path: Path) -> None:
    video = tmp_path / "a"
    video.write_bytes(b"1")
    (each,) = read_inputs([video], None)
    assert each.changed() is None
    video.write_bytes(b"22")
    assert "the video changed while the job ran" in (each.changed() or "")
    video.unlink()
    assert "the video vanished while the job ran" in (each.changed() or "")


def test_no_videos_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no videos"):
        require_files([])
    with pytest.raises(ValueError, match="gone: needs a file"):
        require_files([tmp_path / "gone"])
