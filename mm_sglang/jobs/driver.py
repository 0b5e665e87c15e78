"""One gang that an event loop asks: started, watched and started again by a thread, its requests asked again."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mm_sglang.jobs.gang import Gang
from mm_sglang.jobs.job import TICK_S, TRIES
from mm_sglang.jobs.patience import ReplicaError
from mm_sglang.jobs.replica import Replica
from mm_sglang.parallel.placement import decoder_cpus, host_for_messages
from mm_sglang.parallel.wire import Hub, Message


def _log(what: str, facts: Message) -> None:
    logging.getLogger("ray.serve").warning("gang %s: %s", what, facts.get("error") or f"{facts['seconds']:.0f} s")


class GangFailed(RuntimeError):
    """Every gang that was asked this has failed."""


class RequestFailed(RuntimeError):
    """SGLang has refused the request, or it was aborted."""


@dataclass
class Question:
    """A request that is not answered yet."""

    order: dict[str, Any]
    answer: asyncio.Future[Message]
    tries: int = 0
    given_up: bool = False  # by whoever asked


class GangDriver:
    """A gang and its hub, used by one thread; `ask` reaches them through a queue. Needs a running event loop."""

    def __init__(self, *, at_once: int, replicas: int, **settings: Any) -> None:
        """Args:
        at_once: requests that the gang works on; more of them wait here.
        replicas: how many gangs share the cluster's CPUs.
        settings: `model`, `config`, `extra`, `gpus`, `split` and `max_video_tokens` of a Gang.
        """
        self.at_once = at_once
        self.hub = Hub(host_for_messages())
        decoders = decoder_cpus(settings["gpus"], replicas)
        gang = Gang(
            decoders=decoders, hub=self.hub.address, token=self.hub.token, name=secrets.token_hex(4), **settings
        )  # fmt: skip
        self.replica = Replica(0, gang, self.hub, on_event=_log)
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[Question] = deque()
        self.asked: dict[str, Question] = {}
        self.lost: str | None = None  # why the gang does not start any more
        self.count = 0
        self.ready, self.closing = asyncio.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="gang")
        self.thread.start()

    async def ask(self, video: str, question: str, sampling: dict[str, Any]) -> Message:
        """The answer: text, finish, prompt_tokens, completion_tokens.

        Raises:
            RequestFailed: what SGLang says of it.
            GangFailed: it was asked three times, or there is no gang any more.
        """
        each = Question({"video": video, "question": question, "sampling": sampling}, self.loop.create_future())
        self.waiting.append(each)
        if self.lost is not None:  # looked at after: the thread has ended all that it found waiting
            raise GangFailed(self.lost)
        return await each.answer

    def _run(self) -> None:
        try:
            self.replica.start()
            while not self.closing.is_set():
                self._step()
        except Exception as error:  # a Ray that is gone too: who asks and Serve have to hear of it
            self.lost = str(error) if isinstance(error, ReplicaError) else f"{type(error).__name__}: {error}"
            for each in [*self.asked.values(), *self.waiting]:
                self._end(each, GangFailed(self.lost))
        finally:
            with ExitStack() as each_of_them:
                each_of_them.callback(self.loop.call_soon_threadsafe, self.ready.set)  # who waits has to see `lost`
                each_of_them.callback(self.hub.close)
                each_of_them.callback(self.replica.close)

    def _step(self) -> None:
        for peer, message in self.hub.receive(TICK_S):
            if self.replica.owns(peer) and self.replica.hear(peer, message):
                self._hear(message)
        for rid, why in self.replica.watch().items():
            each = self.asked.pop(rid)
            if each.tries < TRIES:
                self.waiting.appendleft(each)
            else:
                self._end(each, GangFailed(f"{why}; tried {each.tries} times"))
        while self.replica.ready and self.waiting and len(self.asked) < self.at_once:
            each = self.waiting.popleft()
            if each.answer.cancelled():  # its client is gone
                continue
            self.count += 1
            each.tries += 1
            rid = f"{self.replica.gang.name}-{self.count}"
            self.asked[rid] = each
            self.replica.ask(rid, **each.order)
        for rid, each in self.asked.items():
            if each.answer.cancelled() and not each.given_up:
                each.given_up = True
                self.replica.abort(rid)

    def _hear(self, message: Message) -> None:
        kind = message.pop("kind")
        if kind == "ready":
            self.loop.call_soon_threadsafe(self.ready.set)
        elif kind in ("answer", "failed"):
            each = self.asked.pop(message.pop("rid"), None)
            if each is not None:
                self._end(each, message if kind == "answer" else RequestFailed(message["error"]))

    def _end(self, each: Question, what: Message | Exception) -> None:
        def end() -> None:
            if each.answer.done():
                return
            each.answer.set_exception(what) if isinstance(what, Exception) else each.answer.set_result(what)

        self.loop.call_soon_threadsafe(end)

    def close(self) -> None:
        """The end of the gang."""
        self.closing.set()
        self.thread.join()
