"""Processes that outlive what started them, found by a variable of the environment that all of them inherit."""

from __future__ import annotations

import os
import time

import psutil

MARK = "MM_SGLANG_MARK"


def new_mark() -> str:
    """A value of MARK that no other run has."""
    return f"{os.getpid()}-{time.monotonic_ns()}"


def left_behind(mark: str) -> list[str]:
    """Command lines of living processes with this value of MARK, other than this one."""
    found = []
    for process in psutil.process_iter():
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid()
            if alive and process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found
