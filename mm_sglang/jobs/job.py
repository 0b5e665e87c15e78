"""A job's loop: inputs to replicas, answers to the file, and back into the queue what a failed gang was asked."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mm_sglang.jobs.gang import Gang
from mm_sglang.jobs.inputs import Input
from mm_sglang.jobs.patience import Patience, Refused, ReplicaError
from mm_sglang.jobs.replica import Replica
from mm_sglang.jobs.results import Line, Results
from mm_sglang.jobs.schema import Schema, mismatch
from mm_sglang.parallel.placement import decoder_cpus, host_for_messages
from mm_sglang.parallel.wire import Hub, Message

if TYPE_CHECKING:
    from mm_sglang.jobs.run import JobOptions

TRIES = 3  # an input that takes its replica down with it so often becomes an error line
AT_ONCE = 2  # inputs a replica has, so that one is decoded while the other prefills
TICK_S = 0.1


@dataclass
class Work:
    """An input that is not answered yet."""

    input: Input
    tries: int = 0
    replica: int = 0  # that was asked last
    began: float = 0.0
    chunks: list[list[float]] = field(default_factory=list)  # [tokens, seconds], of the current try
    frames: tuple[int, int] = (0, 0)  # decoded, wanted


class Job:
    """Args:
    inputs: those without an answer yet.
    name: unlike any other job's on the cluster.
    on_event: hears of replicas that wait for a place, are ready or down.
    """

    def __init__(
        self,
        options: JobOptions,
        schema: Schema | None,
        inputs: list[Input],
        results: Results,
        *,
        name: str,
        patience: Patience | None = None,
        on_event: Callable[[str, Message], None] | None = None,
    ) -> None:
        self.options, self.schema, self.results = options, schema, results
        self.hub = Hub(host_for_messages())
        # Else a model may go on with white space inside the grammar until its tokens are used up.
        compact = () if schema is None else ("--constrained-json-disable-any-whitespace",)
        gang = Gang(
            model=options.model, config=options.config, extra=(*options.extra, *compact), gpus=options.gpus,
            split=options.split, max_video_tokens=options.max_video_tokens,
            decoders=decoder_cpus(options.gpus, options.replicas), name=name,
            hub=self.hub.address, token=self.hub.token,
        )  # fmt: skip
        self.replicas = [
            Replica(number, gang, self.hub, patience or Patience(), on_event=on_event or self._tell)
            for number in range(options.replicas)
        ]
        self.waiting = deque(Work(each) for each in inputs)
        self.asked: dict[str, tuple[Replica, Work]] = {}
        self.count, self.errors, self.tokens = 0, 0, 0
        self.bar = tqdm(total=len(inputs), unit="video", dynamic_ncols=True, disable=None)

    def run(self, stack: ExitStack) -> int:
        """Until every input has its line. The stack's end is the end of all replicas."""
        stack.callback(self.close)
        for replica in self.replicas:
            replica.start()
        while self.waiting or self.asked:
            self.step(TICK_S)
        return 1 if self.errors else 0

    def close(self) -> None:
        """The end of all replicas."""
        for replica in self.replicas:
            replica.close()
        self.hub.close()
        self.bar.close()

    def step(self, wait_s: float) -> None:
        self._listen(wait_s)
        for replica in list(self.replicas):
            self._listen(0)  # watching another one may have taken a while
            try:
                lost = replica.watch()
            except ReplicaError as error:
                self._lose(replica, error)
                continue
            for rid, why in lost.items():
                self._again(rid, why)
            while replica.ready and self.waiting and self._has_room(replica):
                self._ask(replica, self.waiting.popleft())

    def _has_room(self, replica: Replica) -> bool:
        """What was there when a gang died goes alone the next time: it may have been the reason."""
        suspects = self.waiting[0].tries > 0 or any(self.asked[rid][1].tries > 1 for rid in replica.asked)
        return len(replica.asked) < (1 if suspects else AT_ONCE)

    def _ask(self, replica: Replica, work: Work) -> None:
        if why := work.input.changed():
            self._finish(work, error=why)
            return
        self.count += 1
        rid = f"{replica.gang.name}-{self.count}"
        work.tries, work.replica, work.began = work.tries + 1, replica.number, time.monotonic()
        work.chunks, work.frames = [], (0, 0)
        self.asked[rid] = replica, work
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": self.options.max_tokens}
        if self.schema is not None:
            sampling["json_schema"] = json.dumps(self.schema)
        replica.ask(rid, video=str(work.input.video), question=self.options.question, sampling=sampling)

    def _listen(self, wait_s: float) -> None:
        for peer, message in self.hub.receive(wait_s):
            replica = next((each for each in self.replicas if each.owns(peer)), None)
            if replica is None or not replica.hear(peer, message):  # None: of a gang that is gone
                continue
            kind = message["kind"]
            if kind in ("answer", "failed"):
                self._ended(message)
            elif kind == "chunk":
                self._count_chunk(message)
            elif kind == "decoded":
                self._count_frames(message)

    def _count_frames(self, message: Message) -> None:
        (rid,) = message["rids"]
        if rid in self.asked:
            self.asked[rid][1].frames = message["there"], message["wanted"]
        self._show()

    def _show(self) -> None:
        """What was prefilled, and how far the videos are that are being decoded."""
        frames = [work.frames for _, work in self.asked.values() if work.frames[0] < work.frames[1]]
        there, wanted = (sum(each) for each in zip(*frames, strict=True)) if frames else (0, 0)
        decoding = f", {there:,} of {wanted:,} frames decoded" if frames else ""
        self.bar.set_postfix_str(f"{self.tokens:,} tokens{decoding}", refresh=True)

    def _count_chunk(self, message: Message) -> None:
        self.tokens += message["tokens"]
        self._show()
        for rid in message["rids"]:
            if rid in self.asked:
                self.asked[rid][1].chunks.append([message["tokens"], round(message["seconds"], 4)])

    def _ended(self, message: Message) -> None:
        rid = message.pop("rid")
        if rid not in self.asked:
            return
        _, work = self.asked.pop(rid)
        kind = message.pop("kind")
        if why := work.input.changed():  # an answer to another video than the key's
            self._finish(work, error=why)
        elif kind == "failed":
            self._finish(work, error=message["error"])
        else:
            self._answer(work, message)

    def _answer(self, work: Work, message: Message) -> None:
        text = message.pop("text")
        if self.schema is not None and (why := mismatch(self.schema, text)):
            self._finish(work, error=f"the answer does not fit the schema: {why}", answer=text, **message)
        elif self.schema is not None:
            self._finish(work, answer=json.loads(text), **message)
        else:
            self._finish(work, answer=text, **message)

    def _again(self, rid: str, why: str) -> None:
        _, work = self.asked.pop(rid)
        if work.tries < TRIES:
            self.waiting.appendleft(work)
        else:
            self._finish(work, error=f"{why}; tried {work.tries} times")

    def _finish(self, work: Work, **facts: Any) -> None:
        line: Line = {"key": work.input.key, "video": str(work.input.video), "question": self.options.question, **facts}
        if work.tries:
            line |= {
                "replica": work.replica,
                "tries": work.tries,
                "seconds": round(time.monotonic() - work.began, 3),
                "chunks": work.chunks,
            }
        self.results.add(line)
        if "error" in facts:
            self.errors += 1
            tqdm.write(f"{work.input.video}: {facts['error']}", file=sys.stderr)
        self.bar.update()

    def _lose(self, replica: Replica, error: ReplicaError) -> None:
        """Go on with the others, if there are any that may fare better."""
        for rid in [rid for rid, (owner, _) in self.asked.items() if owner is replica]:
            self._again(rid, str(error))
        replica.close()
        self.replicas.remove(replica)
        if isinstance(error, Refused):
            raise ValueError(str(error)) from error
        if not self.replicas:
            raise RuntimeError(f"no replica left: {error}") from error
        tqdm.write(f"{error}; going on with {len(self.replicas)}", file=sys.stderr)

    def _tell(self, what: str, facts: Message) -> None:
        said = {
            "waiting": "waits for a place: {error}",
            "ready": "ready after {seconds:.0f} s",
            "down": "failed: {error}",
        }
        tqdm.write(f"replica {facts['replica']} {said[what].format(**facts)}", file=sys.stderr)
