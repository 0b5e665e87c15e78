"""A gang behind Ray Serve: it answers, refuses, and answers what it was asked when a rank was killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import psutil
import pytest
from assets import Assets

from mm_sglang.jobs.service import ServiceOptions, require_serve, start_service
from mm_sglang.parallel.placement import connect
from mm_sglang.ports import leased_port

pytestmark = pytest.mark.e2e
ASK_S = 240.0


def ask(port: int, **fields: Any) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(fields).encode())
    try:
        with urllib.request.urlopen(request, timeout=ASK_S) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ranks() -> list[psutil.Process]:
    return [each for each in psutil.Process().children(recursive=True) if each.name().startswith("ray::Rank")]


def test_a_service_whose_rank_is_killed(assets: Assets) -> None:
    try:
        require_serve()
    except ValueError as error:
        pytest.skip(str(error))
    import ray
    from ray import serve

    options = ServiceOptions(
        model=str(assets.models["qwen2_5_vl"]), extra=("--max-total-tokens", "4096", "--chunked-prefill-size", "64")
    )
    (port, _lease), video = leased_port(), str(assets.folder / "wide.mp4")
    connect("local", gpus=1)
    try:
        start_service(options, port=port)
        status, first = ask(port, video=video, question="what is it?", max_tokens=4)
        assert status == 200 and first["completion_tokens"] == 4
        status, refused = ask(port, video=video)
        assert status == 400 and refused["error"] == "question: needs one"
        status, refused = ask(port, video=str(assets.folder / "image.png"), question="?")
        assert status == 400 and "not a video" in refused["error"]

        found: list[tuple[int, dict[str, Any]]] = []
        asking = threading.Thread(
            target=lambda: found.append(ask(port, video=video, question="what is it?", max_tokens=4))
        )
        asking.start()
        time.sleep(0.3)
        (rank,) = ranks()
        os.kill(rank.pid, signal.SIGKILL)
        asking.join(ASK_S)
        assert found and found[0] == (200, first)
        (again,) = ranks()
        assert again.pid != rank.pid
        serve.delete("mm-sglang")
        end = time.monotonic() + 30
        while ranks():
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        serve.shutdown()
        ray.shutdown()
