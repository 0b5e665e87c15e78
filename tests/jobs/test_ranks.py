"""A rank on a host with several GPUs: the number that SGLang takes for its GPU is the one that CUDA knows it by."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import ray

from mm_sglang.compat.ray_ranks import see_all_gpus
from mm_sglang.parallel.placement import connect


class Looking:
    def look(self) -> tuple[str | None, str | None, list[str]]:
        """What Ray shows of the GPUs, what is seen of them then (None: all), and which SGLang takes, by its number."""
        narrowed = os.environ.get("CUDA_VISIBLE_DEVICES")
        see_all_gpus()
        number = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return narrowed, os.environ.get("CUDA_VISIBLE_DEVICES"), number


def test_every_rank_sees_all_gpus_and_has_one_of_its_own() -> None:
    connect("local", gpus=2)
    try:
        actors: list[Any] = [ray.remote(Looking).options(num_cpus=0, num_gpus=1).remote() for _ in range(2)]
        seen = sorted(ray.get([actor.look.remote() for actor in actors], timeout=60))
    finally:
        ray.shutdown()
    assert seen == [("0", None, ["0"]), ("1", None, ["1"])]


def test_it_is_too_late_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", object())
    with pytest.raises(RuntimeError, match="torch is imported"):
        see_all_gpus()
