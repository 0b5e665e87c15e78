"""A job on several hosts: one that is lost takes no result with it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from recipes import SHARED

from benchmarks.soak import soak
from benchmarks.soak_figures import NOTICED_S, Fault

pytestmark = pytest.mark.e2e


def test_every_host_is_lost_and_one_joins(tmp_path: Path) -> None:
    """In the middle of a prefill. `soak` raises if a result is lost or doubled, a process left, a mark missed."""
    heard: list[Fault] = []
    soak(["nodes"], tmp_path, random.Random(0), slack=SHARED, on_fault=heard.append)
    (fault,) = heard
    assert fault["noticed_s"] <= SHARED * NOTICED_S
    assert fault["waited"] == "needs 2 GPUs (0 of the cluster's 0 are free) and 2 CPUs (0 of the cluster's 0 are free)"
