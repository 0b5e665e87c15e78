"""SGLang's detokenizer process, which ends with the leader that spawned it at whatever moment that one is killed."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any


def run_detokenizer(*arguments: Any) -> None:
    """SGLang asks the kernel to end it with its parent, but only after seconds of imports: too late for a leader that
    was killed meanwhile, and the process would stay for ever."""
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
    from sglang.srt.utils import kill_itself_when_parent_died

    kill_itself_when_parent_died()
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)
    run_detokenizer_process(*arguments)
