"""A process's heartbeat: a thread that says every half second that the process runs, with what else is asked of it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from mm_sglang.parallel.wire import Peer

EVERY_S = 0.5


def start_beat(peer: Peer, facts: Callable[[], dict[str, Any]]) -> None:
    """`facts` are sent along. A stopped process stops beating: that is the only sign of it that Ray does not have."""
    import psutil
    import ray

    who = {
        "pid": os.getpid(),
        "created": psutil.Process().create_time(),  # a pid alone may be another process's by the time it is killed
        "node": ray.get_runtime_context().get_node_id(),
    }

    def run() -> None:
        while True:
            peer.send("beat", **who, **facts())
            time.sleep(EVERY_S)

    threading.Thread(target=run, daemon=True, name="beat").start()
