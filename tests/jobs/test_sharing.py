"""A job's loop over several replicas: inputs are shared out, and what a failed gang was asked is asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mm_sglang.jobs import job as module
from mm_sglang.jobs.inputs import read_inputs
from mm_sglang.jobs.job import AT_ONCE, TRIES, Job
from mm_sglang.jobs.patience import Refused, ReplicaError
from mm_sglang.jobs.results import Results
from mm_sglang.jobs.run import JobOptions


class Gangs:
    """Stands in for Replica: a gang that serves at once and answers when told to."""

    def __init__(self, number: int, gang: Any, hub: Any, patience: Any, on_event: Any) -> None:
        self.number, self.gang, self.ready = number, gang, False
        self.asked: dict[str, str] = {}
        self.history: list[str] = []
        self.lost: dict[str, str] = {}
        self.ended: str | None = None
        self.kind = ReplicaError

    def start(self) -> None:
        self.ready = True

    def watch(self) -> dict[str, str]:
        if self.ended:
            raise self.kind(self.ended)
        lost, self.lost = self.lost, {}
        for rid in lost:
            del self.asked[rid]
        return lost

    def ask(self, rid: str, *, video: str, question: str, sampling: dict[str, Any]) -> None:
        self.asked[rid] = video
        self.history.append(Path(video).name)

    def fail(self) -> None:
        self.lost = dict.fromkeys(self.asked, "killed")

    def close(self) -> None:
        self.ready = False


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def make_job(folder: Path, replicas: int, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> Job:
    monkeypatch.setattr(module, "Replica", Gangs)
    monkeypatch.setattr(module, "host_for_messages", lambda: "127.0.0.1")
    monkeypatch.setattr(module, "decoder_cpus", lambda gpus, replicas: 0)
    videos = []
    for number in range(8):
        videos.append(folder / f"{number}")
        videos[-1].write_bytes(bytes([number]))
    options = JobOptions(videos=tuple(videos), question="?", model="m", out=folder / "out.jsonl", replicas=replicas)
    results = stack.enter_context(Results(options.out))
    job = Job(options, None, read_inputs(videos, None), results, name="test")
    stack.callback(job.close)
    for replica in job.replicas:
        replica.start()
    return job


def answer(job: Job, gang: Any) -> None:
    """Everything that this gang has."""
    for rid in list(gang.asked):
        del gang.asked[rid]
        job._ended({"kind": "answer", "rid": rid, "text": "yes"})


def lines(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.results.path.read_text().splitlines()]


def test_inputs_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    job = make_job(tmp_path, 2, monkeypatch, stack)
    gangs: list[Any] = list(job.replicas)
    job.step(0)
    assert [len(gang.asked) for gang in gangs] == [AT_ONCE, AT_ONCE]
    while job.waiting or job.asked:
        answer(job, gangs[1])  # the other one is slow: it keeps what it has, and gets no more
        job.step(0)
        if len(gangs[1].history) == 6:
            answer(job, gangs[0])
    assert [len(gang.history) for gang in gangs] == [2, 6]
    found = lines(job)
    assert sorted(Path(line["video"]).name for line in found) == [str(number) for number in range(8)]
    assert [line["replica"] for line in found].count(1) == 6


def test_what_a_failed_gang_had_goes_to_whoever_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    job = make_job(tmp_path, 2, monkeypatch, stack)
    gangs: list[Any] = list(job.replicas)
    job.step(0)
    had = set(gangs[0].history)
    gangs[0].fail()
    gangs[0].ready = False
    answer(job, gangs[1])
    job.step(0)
    assert len(gangs[1].asked) == 1 and gangs[1].history[-1] in had  # alone: it may have been the reason
    while job.waiting or job.asked:
        answer(job, gangs[1])
        job.step(0)
    found = lines(job)
    assert len(found) == 8 == len({line["key"] for line in found})
    assert {Path(line["video"]).name for line in found if line["tries"] == 2} == had


def test_an_input_that_ends_every_gang_becomes_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    job = make_job(tmp_path, 1, monkeypatch, stack)
    gang: Any = job.replicas[0]
    while job.waiting or job.asked:
        job.step(0)
        if "0" in {Path(video).name for video in gang.asked.values()}:
            gang.fail()
        else:
            answer(job, gang)
    errors = [line for line in lines(job) if "error" in line]
    assert [Path(line["video"]).name for line in errors] == ["0"]
    assert errors[0]["tries"] == TRIES and "killed" in errors[0]["error"]
    assert len(lines(job)) == 8


def test_a_job_goes_on_with_the_replicas_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    job = make_job(tmp_path, 2, monkeypatch, stack)
    gangs: list[Any] = list(job.replicas)
    job.step(0)
    gangs[0].ended = "does not start"
    job.step(0)
    assert job.replicas == [gangs[1]] and len(job.asked) + len(job.waiting) == 8
    gangs[1].ended = "no place"
    with pytest.raises(RuntimeError, match="no replica left: no place"):
        job.step(0)
    assert not lines(job)


def test_refused_settings_end_the_job_as_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    job = make_job(tmp_path, 2, monkeypatch, stack)
    gangs: list[Any] = list(job.replicas)
    gangs[0].ended, gangs[0].kind = "a KV cache of fp8", Refused
    with pytest.raises(ValueError, match="a KV cache of fp8"):
        job.step(0)


def test_progress_says_how_far_decoding_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    job = make_job(tmp_path, 1, monkeypatch, stack)
    said: list[str] = []
    monkeypatch.setattr(job.bar, "set_postfix_str", lambda text, refresh: said.append(text))
    gang: Any = job.replicas[0]
    job.step(0)
    first, second = gang.asked
    job._count_frames({"rids": [first], "there": 3, "wanted": 10})
    job._count_frames({"rids": [second], "there": 1, "wanted": 1000})
    job._count_frames({"rids": [first], "there": 10, "wanted": 10})
    job._count_chunk({"rids": [first], "tokens": 2048, "seconds": 0.5})
    job._count_frames({"rids": [second], "there": 1000, "wanted": 1000})
    assert said[1] == "0 tokens, 4 of 1,010 frames decoded" and said[3] == "2,048 tokens, 1 of 1,000 frames decoded"
    assert said[4] == "2,048 tokens"
