"""One rank of a replica: SGLang's scheduler actor, with plugins loaded, a heartbeat, and the time of every chunk."""

from __future__ import annotations

import pickle
import time
from typing import Any

from mm_sglang.compat.ray_ranks import see_all_gpus
from mm_sglang.jobs.gang import Gang
from mm_sglang.jobs.patience import refusal
from mm_sglang.parallel.beat import start_beat
from mm_sglang.parallel.wire import Peer

TELL_S = 1.0


class Rank:
    """Made a Ray actor by compat/ray_ranks.py; `arguments` are those of SGLang's own SchedulerActor, pickled."""

    def __init__(self, gang: Gang, number: int, arguments: bytes) -> None:
        self.scheduler: Any = None
        name = f"{gang.name}.rank{number}"
        self.peer = Peer(gang.hub, gang.token, name)
        start_beat(self.peer, lambda: {"used": self.used_tokens()})
        try:
            self.actor = self._load(arguments)
        except (Exception, SystemExit) as error:
            if why := refusal(error):  # SGLang makes a RuntimeError of it in the leader
                last = Peer(gang.hub, gang.token, f"{name}.last")  # this process ends with the error, so this one waits
                last.send("refused", error=why, wait=True)
                last.close()
            raise
        self.scheduler = self.actor.scheduler
        if number == 0:
            self._report()

    def _load(self, arguments: bytes) -> Any:
        see_all_gpus()
        from sglang.srt.plugins import load_plugins
        from sglang.srt.ray.scheduler_actor import SchedulerActor

        load_plugins()
        return SchedulerActor.__ray_metadata__.modified_class(**pickle.loads(arguments))

    def used_tokens(self) -> int | None:
        """Tokens of the KV pool that a request holds; the radix cache's own don't count."""
        if self.scheduler is None:
            return None
        return int(self.scheduler.pool_stats_observer.get_pool_stats().get_kv_token_stats()[0])

    def _report(self) -> None:
        """Every chunk with its time, and now and then that answers grow: a long one has no chunks."""
        process, told = self.scheduler.process_batch_result, 0.0

        def reported(batch: Any, result: Any) -> None:
            nonlocal told
            process(batch, result)
            now = time.monotonic()
            if batch.forward_mode.is_extend():
                rids = [request.rid for request in batch.reqs]
                seconds = now - batch.launch_ts
                self.peer.send("chunk", rids=rids, tokens=batch.extend_num_tokens or 0, seconds=seconds)
            elif batch.forward_mode.is_decode() and now - told > TELL_S:
                told = now
                self.peer.send("answering")

        self.scheduler.process_batch_result = reported

    def get_info(self) -> Any:
        return self.actor.get_info()

    def run_event_loop(self) -> None:
        import torch

        if torch.cuda.is_available():
            self.actor.run_event_loop()
        else:  # that one begins with torch.cuda.set_device
            self.scheduler.run_event_loop()
