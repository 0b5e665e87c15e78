"""Random kills, stops and aborts while a job runs: is a result lost or doubled, a page leaked, a process left?

    python -m benchmarks.soak --faults 100 --out soak.json

On a Ray of this machine's own with two logical GPUs, tiny model, CPU: one replica of two ranks. A fault hits a random
process of the gang at a random moment of a prefill. Ends with an error if one of the promises does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from benchmarks.processes import MARK, left_behind, new_mark
from mm_sglang.demo.tables import machine
from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.demo.video import render_video
from mm_sglang.jobs.inputs import read_inputs
from mm_sglang.jobs.job import Job
from mm_sglang.jobs.replica import Replica
from mm_sglang.jobs.results import Results
from mm_sglang.jobs.run import JobOptions
from mm_sglang.parallel.placement import connect

FAULTS = ("kill", "stop", "abort")
NOTICED_S, BACK_S = 5.0, 60.0  # the marks
PAGES_S = 10.0  # an abort has given everything back by then
FLAGS = ("--max-total-tokens", "8192", "--chunked-prefill-size", "64", "--disable-radix-cache")


@dataclass
class Soak:
    """Args:
    kinds: the faults to come, in order.
    come_back: else the job ends as soon as its last fault was noticed, a kill or a stop, with inputs left over; that
        fault waits until the gang has answered once.
    """

    job: Job
    kinds: list[str]
    chance: random.Random
    come_back: bool = True
    done: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0
    _due: float | None = None
    _before: int = 0  # answers when the gang became ready

    def event(self, what: str, facts: dict[str, Any]) -> None:
        now = time.monotonic()
        if what == "ready":
            self._before = len(self.job.results.done)
        if what == "down" and self.done and "noticed_s" not in self.done[-1]:
            self.done[-1] |= {"noticed_s": now - self.done[-1]["at"], "error": facts["error"]}
        elif what == "ready" and self.done and "noticed_s" in self.done[-1]:
            self.done[-1]["back_s"] = now - self.done[-1]["at"]

    def run(self) -> None:
        for replica in self.job.replicas:
            replica.on_event = self.event
            replica.start()
        while self.job.waiting or self.job.asked:
            self.job.step(0.02)
            if not self.come_back and not self.kinds and "noticed_s" in self.done[-1]:
                return
            replica = self.job.replicas[0]
            settled = not self.done or "back_s" in self.done[-1] or "free_s" in self.done[-1]
            if not self.kinds or not settled or not any(replica.used.values()):
                continue
            if not self.come_back and len(self.kinds) == 1 and len(self.job.results.done) == self._before:
                continue
            if self._due is None:
                self._due = time.monotonic() + self.chance.uniform(0, 1.5)
            elif time.monotonic() >= self._due:
                self._due = None
                self.strike(replica, self.kinds.pop(0))
        assert not self.kinds, f"{len(self.kinds)} faults did not happen: give it more inputs"
        self.wait_for_pages()

    def strike(self, replica: Replica, kind: str) -> None:
        fault: dict[str, Any] = {"kind": kind, "at": time.monotonic()}
        if kind == "abort":
            held = max(replica.used.values())
            for rid in list(replica.asked):
                replica.abort(rid)
                self.aborted += 1
            waiting, self.job.waiting = self.job.waiting, type(self.job.waiting)()
            self.wait_for_pages()
            self.job.waiting.extend(waiting)
            fault |= {"held": held, "free_s": time.monotonic() - fault["at"]}
        else:
            peer = self.chance.choice(sorted(replica.processes))  # a rank, the leader or a decoder
            fault["who"] = peer.rpartition(".")[2]
            os.kill(replica.processes[peer].pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
        self.done.append(fault)
        print(json.dumps({key: value for key, value in fault.items() if key != "at"}), flush=True)

    def wait_for_pages(self) -> None:
        """Until nothing is asked and every rank has said, after that, that no request holds a page."""
        replica = self.job.replicas[0]
        idle = False
        end = time.monotonic() + PAGES_S
        while not idle or any(replica.used.values()) or len(replica.used) < replica.gang.gpus:
            assert time.monotonic() < end, f"pages not given back after {PAGES_S} s: {replica.used}"
            self.job.step(0.05)
            if not idle and not self.job.asked:
                idle = True
                replica.used.clear()


def shuffled(faults: int, chance: random.Random) -> list[str]:
    """So many faults, all kinds in turn, in a random order."""
    kinds = [FAULTS[number % len(FAULTS)] for number in range(faults)]
    chance.shuffle(kinds)
    return kinds


def soak(kinds: Sequence[str], folder: Path, chance: random.Random, come_back: bool = True) -> dict[str, Any]:
    """These faults, at random moments of one job; raises AssertionError if a promise is broken.

    Args:
        come_back: as Soak's.
    """
    model = make_tiny_model(folder / "model")
    video = render_video(folder / "video.mp4", seconds=8.0, width=224, height=168).path
    options = JobOptions(
        videos=(video,), question="what?", model=str(model), out=folder / "out.jsonl", gpus=2, extra=FLAGS, max_tokens=8
    )
    inputs = [read_inputs([video], number)[0] for number in range(2 * len(kinds) + 4)]
    os.environ[MARK] = mark = new_mark()
    began = time.monotonic()
    with ExitStack() as stack:
        results = stack.enter_context(Results(options.out))
        stack.callback(ray.shutdown)
        connect("local", gpus=2)
        job = Job(options, None, inputs, results, name=f"soak{os.getpid()}")
        stack.callback(job.close)
        test = Soak(job, list(kinds), chance, come_back)
        test.run()
        open_keys = [work.input.key for work in (*job.waiting, *(work for _, work in job.asked.values()))]
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    keys = [line["key"] for line in lines]
    assert sorted(keys + open_keys) == sorted(each.key for each in inputs), "results lost or doubled"
    assert not (come_back and open_keys), f"no results: {open_keys}"
    answers = {line["answer"] for line in lines if "error" not in line}
    assert len(answers) == 1, f"answers to one prompt differ: {answers}"
    end = time.monotonic() + PAGES_S
    while (left := left_behind(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left, f"processes left: {left}"
    return summary(test.done, lines) | {"seconds": round(time.monotonic() - began), "inputs": len(inputs)}


def summary(done: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures; AssertionError if a mark is missed."""

    def of(name: str) -> dict[str, float]:
        values = [fault[name] for fault in done if name in fault]
        return (
            {"median": round(statistics.median(values), 2), "worst": round(max(values), 2), "of": len(values)}
            if values
            else {}
        )

    figures = {name: of(name) for name in ("noticed_s", "back_s", "free_s")}
    assert figures["noticed_s"].get("worst", 0) <= NOTICED_S, figures
    assert figures["back_s"].get("worst", 0) <= BACK_S, figures
    counts = {kind: sum(fault["kind"] == kind for fault in done) for kind in FAULTS}
    errors = [line["error"] for line in lines if "error" in line]
    return {"faults": counts, **figures, "answers": len(lines) - len(errors), "error lines": len(errors)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        chance = random.Random(arguments.seed)
        found = soak(shuffled(arguments.faults, chance), Path(scratch), chance)
    figures = {"machine": machine(), "seed": arguments.seed} | found
    print(json.dumps(figures))
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
