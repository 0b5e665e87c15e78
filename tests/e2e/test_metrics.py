"""A real server's /metrics after a sparse and a dense prompt."""

from __future__ import annotations

import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import yaml
from asking import FORKED
from assets import Assets

from mm_sglang.demo.client import ask
from mm_sglang.demo.server import Server
from mm_sglang.serve import server_command

pytestmark = pytest.mark.e2e


def test_metrics_of_a_server(assets: Assets) -> None:
    config = assets.folder / "metrics.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "default": {"pattern": "a_shape", "sink": 16, "local": 32},
                "min_tokens": 120,
                "text_tail": 0,  # more than all causal tiles in prompts this short
                "probe": {"every": 1},
                "guard": {"coverage": 0.999999, "grow": 1},
            }
        )  # fmt: skip
    )
    command, environment = server_command(
        str(assets.models["qwen2_5_vl"]), config=str(config), cores=2,
        extra=["--max-total-tokens", "16384", "--chunked-prefill-size", "64", "--enable-mixed-chunk",
               "--enable-metrics"],
    )  # fmt: skip
    with Server(command, environment | FORKED, assets.folder / "metrics.log") as server:
        with ThreadPoolExecutor(1) as chat:
            chat.submit(ask, server.url, [("text", "short")], 3000 if torch.cuda.is_available() else 200)
            for name in ("video", "mixed"):
                ask(server.url, assets.prompts[name], 2)
        with urllib.request.urlopen(server.url + "/metrics") as answer:
            text = answer.read().decode()
        assert "decode in a mixed batch" in server.log.read_text(errors="replace") and "mixed batch" not in text
    values = {m[1]: float(m[2]) for m in re.finditer(r"^(mm_sglang:\S+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}

    def value(name: str) -> float:
        return next(v for key, v in values.items() if key.startswith(f"mm_sglang:{name}"))

    assert value('prefill_tokens_total{mode="sparse"') > 100 and value('prefill_tokens_total{mode="dense"') > 0
    chunks, requests = (
        value(f'dense_{what}_total{{reason="fewer keys than min_tokens=120"') for what in ("chunks", "requests")
    )
    assert 3 <= requests <= chunks  # the three above and SGLang's own at its start
    assert 0 < value("tiles_computed_total") <= value("tiles_causal_total")
    assert 0 < value("recall_worst") <= value("recall_mean") <= 1
    assert value('guarded_heads_total{action="grown"') > 0
    if torch.cuda.is_available():  # there is no device clock on a CPU
        assert value('stage_seconds_total{stage="attend"') > 0 and value('stage_seconds_total{stage="plan"') > 0
