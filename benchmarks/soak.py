"""Random kills, stops, aborts and node losses while a job runs: is anything lost, doubled, leaked, left?

    python -m benchmarks.soak --faults 100 --minutes 60 --out soak.json     again, until all have happened

On Ray's simulated cluster on this machine, two hosts of two logical GPUs, tiny model, CPU: one replica of two
context-parallel ranks. A fault hits a random process of the gang, or its host, at a random moment of a prefill. The
file is written after every fault, and a later run goes on from it. Ends with an error if a promise does not hold.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from benchmarks.common import Parser
from benchmarks.processes import MARK, left_behind, new_mark
from benchmarks.soak_figures import Fault, Keeper, require_marks, summary
from benchmarks.soak_nodes import Nodes
from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.demo.video import render_video
from mm_sglang.jobs.inputs import Input, read_inputs
from mm_sglang.jobs.job import TRIES, Job, Work
from mm_sglang.jobs.replica import Replica
from mm_sglang.jobs.results import Results
from mm_sglang.jobs.run import JobOptions
from mm_sglang.parallel.placement import connect

# "node" loses the gang's host while another one is free, "nodes" every host: one joins once the job says it waits.
FAULTS = ("kill", "stop", "abort", "node", "nodes")
PAGES_S = 10.0  # an abort has given everything back by then
FLAGS = ("--max-total-tokens", "8192", "--chunked-prefill-size", "304", "--disable-radix-cache")  # spread over both
MOMENT_S = 4.0  # a fault comes within this after a prefill was seen
AHEAD = 4  # inputs that wait, as long as faults are to come


@dataclass
class Soak:
    """Args:
    kinds: the faults to come, in order; no more of them after `until`.
    next_input: makes one unlike all before.
    on_fault: hears of each that is over.
    come_back: else the job ends as soon as its last fault was noticed, a kill or a stop, with inputs left over; that
        fault waits until the gang has answered once.
    slack: as soak's.
    """

    job: Job
    nodes: Nodes
    kinds: list[str]
    until: float
    chance: random.Random
    next_input: Callable[[], Input]
    on_fault: Callable[[Fault], None]
    come_back: bool = True
    slack: float = 1.0
    issued: list[str] = field(default_factory=list)  # keys
    fault: Fault | None = None  # the one under way
    _due: float | None = None
    _before: int = 0  # answers when the gang became ready

    def event(self, what: str, facts: dict[str, Any]) -> None:
        if what == "ready":
            self._before = len(self.job.results.done)
        if self.fault is None:
            return
        passed = time.monotonic() - self.fault["at"]
        if what == "down" and "noticed_s" not in self.fault:
            self.fault |= {"noticed_s": passed, "error": facts["error"]}
        elif what == "waiting" and "waited" not in self.fault:
            self.fault |= {"waited": facts["error"]}
            if self.fault["kind"] == "nodes":
                self.nodes.join()
        elif what == "ready" and "noticed_s" in self.fault:
            self.fault["back_s"] = passed

    def run(self) -> None:
        (replica,) = self.job.replicas
        replica.on_event = self.event
        self.supply()
        replica.start()
        while self.job.waiting or self.job.asked:
            self.job.step(0.02)
            if self.fault is not None:
                self.settle()
                if not (self.come_back or self.kinds or self.fault):
                    return
            elif self.kinds and time.monotonic() < self.until:
                self.supply()
                self.maybe_strike(replica)
        self.wait_for_pages()

    def supply(self) -> None:
        while len(self.job.waiting) < AHEAD:
            work = Work(self.next_input())
            self.issued.append(work.input.key)
            self.job.waiting.append(work)

    def maybe_strike(self, replica: Replica) -> None:
        """At a random moment of a prefill."""
        if not any(replica.used.values()) or any(work.tries == TRIES for _, work in self.job.asked.values()):
            return  # once more, and the job would give that input up, as it should
        if not self.come_back and len(self.kinds) == 1 and len(self.job.results.done) == self._before:
            return
        if self._due is None:
            self._due = time.monotonic() + self.chance.uniform(0, MOMENT_S)
        elif time.monotonic() >= self._due:
            self._due = None
            self.strike(replica, self.kinds.pop(0))

    def strike(self, replica: Replica, kind: str) -> None:
        self.fault = {"kind": kind, "at": time.monotonic()}
        if kind == "abort":
            self.fault["held"] = max(replica.used.values())
            for rid in list(replica.asked):
                replica.abort(rid)
            waiting, self.job.waiting = self.job.waiting, type(self.job.waiting)()
            self.wait_for_pages()
            self.job.waiting.extend(waiting)
            self.fault["free_s"] = time.monotonic() - self.fault["at"]
        elif kind == "node":
            self.nodes.lose({process.node for process in replica.processes.values()})
        elif kind == "nodes":
            self.nodes.lose_all()
        else:
            peer = self.chance.choice(sorted(replica.processes))  # a rank, the leader or a decoder
            self.fault["who"] = peer.rpartition(".")[2]
            os.kill(replica.processes[peer].pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])

    def settle(self) -> None:
        """Once the fault is over, let new hosts join for those that were lost, and tell."""
        assert self.fault is not None
        over = ("back_s", "free_s") if self.come_back or self.kinds else ("noticed_s",)
        if not any(name in self.fault for name in over):
            return
        while self.nodes.count < self.nodes.wanted:
            self.nodes.join()
        fault, self.fault = self.fault, None
        del fault["at"]
        self.on_fault({key: round(value, 3) if isinstance(value, float) else value for key, value in fault.items()})

    def wait_for_pages(self) -> None:
        """Until nothing is asked and every rank has said, after that, that no request holds a page."""
        replica = self.job.replicas[0]
        idle = False
        end = time.monotonic() + self.slack * PAGES_S
        while not idle or any(replica.used.values()) or len(replica.used) < replica.gang.gpus:
            assert time.monotonic() < end, f"pages not given back after {self.slack * PAGES_S} s: {replica.used}"
            self.job.step(0.05)
            if not idle and not self.job.asked:
                idle = True
                replica.used.clear()


def shuffled(faults: int, chance: random.Random) -> list[str]:
    """So many faults, all kinds in turn, in a random order."""
    kinds = [FAULTS[number % len(FAULTS)] for number in range(faults)]
    chance.shuffle(kinds)
    return kinds


def soak(
    kinds: Sequence[str],
    folder: Path,
    chance: random.Random,
    come_back: bool = True,
    *,
    minutes: float = math.inf,
    slack: float = 1.0,
    keeper: Keeper | None = None,
    on_fault: Callable[[Fault], None] = lambda fault: None,
) -> dict[str, Any]:
    """These faults, at random moments of one job; raises AssertionError if a promise is broken.

    Args:
        come_back: as Soak's.
        minutes: after which no more faults come; what is asked is still answered.
        slack: how many times the marks everything may take, where other work shares the machine.
        keeper: knows the faults of earlier runs, the first of `kinds`, and writes down each new one.
        on_fault: hears of each when it is over.
    """
    keeper, began = keeper or Keeper(None, 0), time.monotonic()
    done, before = keeper.done, len(keeper.done)
    model = make_tiny_model(folder / "model")
    video = render_video(folder / "video.mp4", seconds=24.0, width=224, height=168).path
    options = JobOptions(
        videos=(video,), question="what?", model=str(model), out=folder / "out.jsonl", gpus=2, extra=FLAGS, max_tokens=8
    )
    numbers = iter(range(1 << 30))

    def over(fault: Fault) -> None:
        print(f"{len(done) + 1}/{len(kinds)} {json.dumps(fault)}", flush=True)
        keeper.add(fault)
        on_fault(fault)

    os.environ[MARK] = mark = new_mark()
    with ExitStack() as stack:
        results = stack.enter_context(Results(options.out))
        nodes = Nodes(2 if "node" in kinds else int("nodes" in kinds))
        stack.callback(nodes.close)
        stack.callback(ray.shutdown)
        connect(nodes.address, gpus=0)
        nodes.wait()
        job = Job(options, None, [], results, name=f"soak{os.getpid()}")
        stack.callback(job.close)
        test = Soak(
            job, nodes, list(kinds[before:]), began + 60 * minutes, chance,
            lambda: read_inputs([video], next(numbers))[0], over, come_back, slack,
        )  # fmt: skip
        test.run()
        open_keys = [work.input.key for work in (*job.waiting, *(work for _, work in job.asked.values()))]
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    assert sorted([line["key"] for line in lines] + open_keys) == sorted(test.issued), "results lost or doubled"
    assert not (come_back and open_keys), f"no results: {open_keys}"
    answers = [line["answer"] for line in lines if "error" not in line]
    assert len(set(answers)) == 1, f"answers to one prompt differ: {set(answers)}"
    end = time.monotonic() + slack * PAGES_S
    while (left := left_behind(mark)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not left, f"processes left: {left}"
    errors = [line["error"] for line in lines if "error" in line]
    assert all(error.startswith("aborted") for error in errors), errors
    seconds = round(time.monotonic() - began)
    keeper.end({"struck": len(done) - before, "answers": len(answers), "aborted": len(errors), "seconds": seconds})
    require_marks(done, slack)
    return summary(done) | keeper.runs[-1]


if __name__ == "__main__":
    parser = Parser("benchmarks.soak", __doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no more faults after these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file, written after each fault; a later run goes on from it")
    arguments = parser.parse_args()
    try:
        keeper = Keeper(arguments.out, arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    all_kinds = shuffled(arguments.faults, random.Random(arguments.seed))
    chance = random.Random(f"{arguments.seed} {len(keeper.done)}")
    if len(keeper.done) < arguments.faults:
        with tempfile.TemporaryDirectory() as scratch:
            soak(all_kinds, Path(scratch), chance, minutes=arguments.minutes, keeper=keeper)
    print(json.dumps(summary(keeper.done) | {"runs": keeper.runs}))
    print(f"{len(keeper.done)} of {arguments.faults} faults")
    require_marks(keeper.done)
