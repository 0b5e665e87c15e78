"""A file of results: whole lines, one an input, whatever happened to the job that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mm_sglang.jobs.results import Results


def written(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_there_when_add_returns_and_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    with Results(path) as results:
        results.add({"key": "a", "answer": "ä\n"})
        assert written(path) == [{"key": "a", "answer": "ä\n"}]
        results.add({"key": "b", "error": "gone"})
    with Results(path) as results:
        assert results.done == {"a"}


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    line = b'{"key": "b", "answer": 1}\n'
    path.write_bytes(b'{"key": "a", "answer": 1}\n' + line[:cut])
    with Results(path) as results:
        assert results.done == {"a"}
        results.add({"key": "b", "answer": 2})
    assert [entry["key"] for entry in written(path)] == ["a", "b"]


def test_error_lines_of_what_is_tried_again_go(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        for key in "abc":
            results.add({"key": key, "error": "gone"})
    with Results(path, again={"a", "b"}) as results:
        results.add({"key": "a", "answer": 1})
    assert written(path) == [{"key": "c", "error": "gone"}, {"key": "a", "answer": 1}]


def test_a_file_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Results(path) as first:
        first.add({"key": "a", "error": "x"})
        first.retry({"a"})  # replaces the file: the lock moves along
        with pytest.raises(ValueError, match="another job is writing it"):
            Results(path)
    Results(path).close()


def test_what_is_no_file_of_results_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes\nmore\n")
    with pytest.raises(ValueError, match="line 1 is not a result of a job"):
        Results(path)
    assert path.read_text() == "my notes\nmore\n"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Results(tmp_path / "file" / "out.jsonl")
    with pytest.raises(ValueError, match="cannot be written"):
        Results(tmp_path)


def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Results(path) as results:
        results.add({"key": "a", "answer": 1})
        results._file.close()
        results._file = Path("/dev/full").open("r+b")  # noqa: SIM115  # takes nothing
        with pytest.raises(
            ValueError, match=r"out.jsonl: cannot be written \(No space left on device\); 1 answers are kept"
        ):
            results.add({"key": "b", "answer": 2})
    with Results(path) as again:
        assert again.done == {"a"}
