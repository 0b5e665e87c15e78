"""A replica seen from the driver. All of its ranks fail together: any one dead or silent, and the gang starts again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mm_sglang.jobs.gang import Gang
from mm_sglang.jobs.leader import Leader
from mm_sglang.jobs.patience import Patience, Refused, ReplicaError
from mm_sglang.parallel.placement import Process, decoder_cpus, lost_nodes, no_place, nodes_of, place, reap
from mm_sglang.parallel.wire import Hub, Message

PLACE_ANEW_S = 5.0  # what is free, and so what to ask for, may be something else by then
LOOK_S = 1.0
STEPS = ("chunk", "decoded", "answering", "answer", "failed")  # messages that say that a gang gets on


@dataclass
class Replica:
    """Call `start`, hand it every message of its name, and call `watch` now and then.

    Args:
        number: among the job's replicas.
        gang: what its processes are told; the name is a prefix here.
    """

    number: int
    gang: Gang
    hub: Hub
    patience: Patience = field(default_factory=Patience)
    ready: bool = False
    generation: int = 0
    failed_starts: int = 0
    asked: list[str] = field(default_factory=list)  # rids
    used: dict[str, int] = field(default_factory=dict)  # rank -> tokens of its pool that requests hold
    processes: dict[str, Process] = field(default_factory=dict)
    on_event: Callable[[str, Message], None] | None = None  # ("waiting" | "ready" | "down", facts)
    _beats: dict[str, float] = field(default_factory=dict)
    _group: PlacementGroup | None = None
    _nodes: set[str] = field(default_factory=set)  # of the group
    _looked: float = 0.0  # whether there is a better place, or whether the nodes are still there
    _leader: Any = None
    _run: Any = None
    _broken: str | None = None
    _refused: bool = False
    _served: bool = False  # ever
    _moved: float = 0.0  # when it last got on with what was asked, whichever of it: the rest waits its turn
    _share: int = 0  # decoders that leave the other replicas theirs
    _missing: str | None = None  # what was last said to be
    _since: float = 0.0
    _name: str = ""

    def __post_init__(self) -> None:
        self._share = self.gang.decoders

    def start(self) -> None:
        """Ask for a place; `watch` starts the processes there, and a message says when they serve."""
        if self._group is None:
            self._place()
        self.ready, self._broken, self._run = False, None, None
        self._since = self._looked = time.monotonic()

    def _place(self) -> None:
        self._group = place(self.gang.gpus, self.gang.decoders, f"{self.gang.name}.{self.number}")

    def _launch(self, group: PlacementGroup) -> None:
        self.generation += 1
        self._name = f"{self.gang.name}.{self.number}.{self.generation}"
        self._since = self._looked = time.monotonic()
        self._nodes, self._missing = nodes_of(group), None
        self._leader = (
            ray.remote(Leader)
            .options(
                num_cpus=0,
                num_gpus=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
                # it holds no GPU, but sees them as SGLang's tokenizer process does everywhere else
                runtime_env={"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}},
            )
            .remote(replace(self.gang, name=self._name), group)
        )
        self._run = self._leader.run.remote()

    def owns(self, peer: str) -> bool:
        return peer.startswith(self._name + ".")

    def hear(self, peer: str, message: Message) -> bool:
        """Take note of a message of this gang's; False for a failure that a broken gang explains."""
        kind, now = message["kind"], time.monotonic()
        if kind == "failed" and self._broken is not None:
            return False
        if kind == "beat":
            self._beats[peer] = now
            self.processes[peer] = Process(pid=message["pid"], created=message["created"], node=message["node"])
            if message.get("used") is not None:
                self.used[peer] = message["used"]
        elif kind == "ready":
            self.ready, self._served, self.failed_starts = True, True, 0
            self._beats = dict.fromkeys(self._beats, now)
            self._event("ready", seconds=now - self._since)
        elif kind in ("broken", "refused"):
            self._refused |= kind == "refused" and not self._served  # else it is not the settings
            self._broken = self._broken or message["error"]
        elif kind in STEPS:
            self._moved = now
            if kind in ("answer", "failed") and message["rid"] in self.asked:
                self.asked.remove(message["rid"])
        return True

    def ask(self, rid: str, *, video: str, question: str, sampling: dict[str, Any]) -> None:
        if not self.asked:
            self._moved = time.monotonic()
        self.asked.append(rid)
        order = {"kind": "ask", "rid": rid, "video": video, "question": question, "sampling": sampling}
        self.hub.send(f"{self._name}.orders", order)

    def abort(self, rid: str) -> None:
        """What was asked comes back as failed, and its pages are free on every rank."""
        self.hub.send(f"{self._name}.orders", {"kind": "abort", "rid": rid})

    def fault(self) -> str | None:
        """Why the gang has to go, or None if all is well."""
        now = time.monotonic()
        if self._broken is not None:
            return self._broken
        if ray.wait([self._run], timeout=0)[0]:
            return f"its leader ended: {_cause(self._run)}"
        if not self.ready and now - self._looked > LOOK_S:  # what has not sent its first heartbeat cannot fall silent
            self._looked = now
            if lost := lost_nodes(self._nodes):
                return f"lost with its node {', '.join(sorted(lost))}"
        silence = self.patience.silence if self.ready else self.patience.start_silence
        for peer, last in self._beats.items():
            if now - last > silence:
                return f"{peer.rpartition('.')[2]} has been silent for {now - last:.1f} s (killed, stopped or cut off)"
        if not self.ready and now - self._since > self.patience.start:
            return f"not ready after {self.patience.start:.0f} s"
        if self.asked and now - self._moved > self.patience.stall:
            return f"no frame, chunk or token for {self.patience.stall:.0f} s"
        return None

    def watch(self) -> dict[str, str]:
        """Empty while all is well. Else the gang has been ended and is to start again: what it was asked, and why not.

        Read its messages just before, or it looks silent.

        Raises:
            Refused: its settings are wrong.
            ReplicaError: no place for it, or it failed to start too often.
        """
        if self._run is None:
            self._place_or_wait()
            return {}
        why = self.fault()
        if why is None:
            return {}
        if not self.ready:
            self.failed_starts += 1
        lost = dict.fromkeys(self.asked, f"replica {self.number} failed: {why}")
        if self._refused:
            self.kill()
            raise Refused(f"replica {self.number} does not start: {why}")
        self._event("down", error=why)
        self.kill()
        if self.failed_starts >= self.patience.starts:
            raise ReplicaError(f"replica {self.number} does not start: {why}")
        self.start()
        return lost

    def _place_or_wait(self) -> None:
        assert self._group is not None, "start() comes first"
        now = time.monotonic()
        patience = self.patience.place_again if self.generation else self.patience.place
        if self._group.wait(0):
            self._launch(self._group)
        elif now - self._since > patience:
            missing = no_place(self._group) or "enough is free, but Ray places nothing"
            raise ReplicaError(f"replica {self.number}: no place after {patience:.0f} s: {missing}")
        elif now - self._looked > PLACE_ANEW_S:
            if (missing := no_place(self._group)) and missing != self._missing:
                self._missing = missing
                self._event("waiting", error=missing)
            self._leave()
            self.gang = replace(self.gang, decoders=min(self._share, decoder_cpus(self.gang.gpus, 1)))
            self._place()
            self._looked = now

    def kill(self) -> None:
        """End every process of the gang, stopped ones too; the placement group stays, unless a node of it is lost."""
        self.ready = False
        if self._leader is not None:
            ray.kill(self._leader)
            reap(self.processes.values())
            self._leader = None
            if lost_nodes(self._nodes):
                self._leave()
        self._name = "of no gang"  # what the old one had sent and is still to come says nothing about the next
        for table in (self.asked, self.used, self.processes, self._beats):
            table.clear()

    def close(self) -> None:
        self.kill()
        self._leave()

    def _leave(self) -> None:
        """Give the place back."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _event(self, what: str, **facts: Any) -> None:
        if self.on_event is not None:
            self.on_event(what, {"replica": self.number, "generation": self.generation, **facts})


def _cause(finished: Any) -> str:
    """The last line of what a Ray call raised."""
    try:
        ray.get(finished, timeout=1)
    except ray.exceptions.RayActorError:
        return "killed or crashed"
    except Exception as error:  # whatever it was, it has to be told
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return lines[-1] if lines else type(error).__name__
    return "without an error"
