"""What the ranks of a gang are started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mm_sglang.jobs.gang import gang_command


def started(folder: Path, **options: Any) -> str:
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    given = {"config": None, "extra": (), "gpus": 2, "split": "context", "max_video_tokens": None, "cores": 2} | options
    return " ".join(gang_command(model=str(folder), **given)[0])


def test_gpus_share_out_a_prefills_tokens_unless_told_otherwise(tmp_path: Path) -> None:
    context = started(tmp_path)
    assert "--tp-size 2 --attn-cp-size 2 --enable-prefill-cp" in context
    tensor = started(tmp_path, split="tensor", extra=("--page-size", "16"))
    assert "--tp-size 2 --page-size 16" in tensor and "--attn-cp-size" not in tensor
    assert "--tp-size" not in started(tmp_path, gpus=1)


def test_what_only_the_gangs_own_machine_can_know_is_left_to_it(tmp_path: Path) -> None:
    """A driver without a GPU may ask for a gang that has some: those need not divide the KV heads."""
    with pytest.raises(ValueError, match="over 3 CPU ranks: needs a divisor of the model's 2 KV heads"):
        started(tmp_path, gpus=3, cores=3)
    assert "--attn-cp-size 3" in started(tmp_path, gpus=3, cores=None)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split='both': needs one of context, tensor"):
        started(tmp_path, split="both")


def test_what_a_replica_cannot_do_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for flag in ("--pp-size", "--pipeline-parallel-size=2"):
        with pytest.raises(ValueError, match="a replica has no pipeline stages"):
            started(tmp_path, extra=(flag, "2"))
    with pytest.raises(ValueError, match="--enable-mixed-chunk: context parallelism needs none"):
        started(tmp_path, extra=("--enable-mixed-chunk",))
    assert "--enable-mixed-chunk" in started(tmp_path, extra=("--enable-mixed-chunk",), gpus=1)
