"""One rank of a replica: SGLang's scheduler actor, with plugins loaded, a heartbeat, and the time of every chunk."""

from __future__ import annotations

import time
from typing import Any

from mm_sglang.jobs.gang import Gang
from mm_sglang.parallel.beat import start_beat
from mm_sglang.parallel.wire import Peer


class Rank:
    """Made a Ray actor by compat/ray_ranks.py; `arguments` are those of SGLang's own SchedulerActor."""

    def __init__(self, gang: Gang, number: int, arguments: dict[str, Any]) -> None:
        self.scheduler: Any = None
        self.peer = Peer(gang.hub, gang.token, f"{gang.name}.rank{number}")
        start_beat(self.peer, lambda: {"used": self.used_tokens()})

        from sglang.srt.plugins import load_plugins
        from sglang.srt.ray.scheduler_actor import SchedulerActor

        load_plugins()
        self.actor = SchedulerActor.__ray_metadata__.modified_class(**arguments)
        self.scheduler = self.actor.scheduler
        self._time_chunks(report=number == 0)

    def used_tokens(self) -> int | None:
        """Tokens of the KV pool that a request holds; the radix cache's own don't count."""
        if self.scheduler is None:
            return None
        return int(self.scheduler.pool_stats_observer.get_pool_stats().get_kv_token_stats()[0])

    def _time_chunks(self, *, report: bool) -> None:
        process = self.scheduler.process_batch_result

        def timed(batch: Any, result: Any) -> None:
            process(batch, result)
            if report and batch.forward_mode.is_extend():
                seconds = time.monotonic() - batch.launch_ts
                rids = [request.rid for request in batch.reqs]
                self.peer.send("chunk", rids=rids, tokens=batch.extend_num_tokens or 0, seconds=seconds)

        self.scheduler.process_batch_result = timed

    def get_info(self) -> Any:
        return self.actor.get_info()

    def run_event_loop(self) -> None:
        import torch

        if torch.cuda.is_available():
            self.actor.run_event_loop()
        else:  # that one begins with torch.cuda.set_device
            self.scheduler.run_event_loop()
