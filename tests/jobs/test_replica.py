"""When a gang counts as stalled, and what no second start would help."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from mm_sglang.jobs import replica as module
from mm_sglang.jobs.gang import Gang
from mm_sglang.jobs.patience import Patience, Refused, ReplicaError, refusal
from mm_sglang.jobs.replica import Replica


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([], asked))
    return clock


def started(*, ready: bool, decoders: int = 2) -> Replica:
    gang = Gang(
        model="m", config=None, extra=(), gpus=2, split="context", max_video_tokens=None, decoders=decoders, hub="",
        token="", name="g",
    )  # fmt: skip
    hub: Any = SimpleNamespace(send=lambda peer, message: None)
    made = Replica(0, gang, hub)
    made._name, made._run = "g", object()
    if ready:
        made.hear("g.orders", {"kind": "ready"})
    return made


def asked(count: int) -> Replica:
    made = started(ready=True)
    for number in range(count):
        made.ask(str(number), video="a", question="?", sampling={})
    return made


def test_what_waits_for_others_of_its_gang_does_not_end_it(clock: Clock) -> None:
    """Eight videos of 50 s each: the last has to wait for more than the gang may stand still."""
    gang = asked(8)
    for number in range(8):
        clock.now += 50
        assert gang.fault() is None
        gang.hear("g.rank0", {"kind": "chunk", "rids": [str(number)]})
        gang.hear("g.leader", {"kind": "answer", "rid": str(number)})
    assert gang.asked == [] and clock.now - 1000 > Patience().stall
    clock.now += 10_000  # nothing to do is no standstill
    assert gang.fault() is None
    gang.ask("next", video="a", question="?", sampling={})
    assert gang.fault() is None


@pytest.mark.parametrize("kind", ["chunk", "decoded", "answering"])
def test_a_long_video_and_a_long_answer_get_on(clock: Clock, kind: str) -> None:
    gang = asked(1)
    for _ in range(10):
        clock.now += 200
        gang.hear("g.rank0", {"kind": kind})
        assert gang.fault() is None


def test_a_gang_that_stands_still_is_noticed_whatever_else_it_is_asked(clock: Clock) -> None:
    gang = asked(1)
    clock.now += 200
    gang.ask("another", video="b", question="?", sampling={})
    clock.now += 101
    assert gang.fault() == "no frame, chunk or token for 300 s"


def test_settings_that_a_rank_refuses_are_not_tried_again(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    gang = started(ready=False)
    monkeypatch.setattr(module, "lost_nodes", lambda nodes: set())
    heard: list[str] = []
    gang.on_event = lambda what, facts: heard.append(what)
    for rank in range(2):
        gang.hear(f"g.rank{rank}.last", {"kind": "refused", "error": f"no {rank}"})
    with pytest.raises(Refused, match="replica 0 does not start: no 0"):
        gang.watch()
    assert heard == []  # the error says it all


def test_settings_that_have_served_are_not_the_reason(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang raises ValueError for memory that the gang before has not given back yet, too."""
    gang, begun = started(ready=True), []
    monkeypatch.setattr(Replica, "start", lambda self: begun.append(1))
    gang.hear("g.rank0.last", {"kind": "refused", "error": "memory is unbalanced"})
    gang.watch()
    assert begun


def waiting(clock: Clock, monkeypatch: pytest.MonkeyPatch, *, missing: str, cpus: int, decoders: int = 2) -> Replica:
    """A gang without a place, for want of `missing`, where decoders may have so many CPUs."""
    gang = started(ready=False, decoders=decoders)
    group: Any = SimpleNamespace(wait=lambda seconds: False)
    gang._run, gang._group, gang._since = None, group, clock.now
    told = {"no_place": missing, "decoder_cpus": cpus, "remove_placement_group": None, "place": group}
    for name, value in told.items():
        monkeypatch.setattr(module, name, lambda *arguments, value=value: value)
    return gang


def test_a_replica_that_waits_leaves_others_their_decoders(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    gang = waiting(clock, monkeypatch, missing="", cpus=8, decoders=3)
    clock.now += 10
    gang.watch()
    assert gang.gang.decoders == 3


@pytest.mark.parametrize(("missing", "said"), [("needs 2 GPUs", ["needs 2 GPUs"]), ("", [])])
def test_only_what_is_missing_is_said(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, missing: str, said: list[str]
) -> None:
    gang, heard = waiting(clock, monkeypatch, missing=missing, cpus=2), []
    gang.on_event = lambda what, facts: heard.append((what, facts["error"]))
    for _ in range(2):  # and only once
        clock.now += 10
        gang.watch()
    assert heard == [("waiting", each) for each in said]
    clock.now += 1e6
    with pytest.raises(ReplicaError, match=missing or "enough is free, but Ray places nothing"):
        gang.watch()


def test_what_is_a_refusal() -> None:
    wrapped = RuntimeError("Custom placement group validation failed")
    wrapped.__cause__ = ValueError("needs 4\n GPU bundles")
    assert refusal(wrapped) == "needs 4 GPU bundles" and refusal(ValueError("x")) == "x"
    assert refusal(AssertionError()) == "AssertionError"
    assert refusal(RuntimeError("Scheduler actor failed to initialize")) is None
