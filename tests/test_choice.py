"""What is refused at start: engines that don't fit the device, attention that the kernels don't compute."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm_sglang.choice import check_attention, check_engine, choose_engine
from mm_sglang.kernels.engines import engine


def runner(*, speculative: bool = False, layer: dict[str, Any] | None = None, **given: Any) -> Any:
    """As much of SGLang's runner as is looked at, with one of SGLang's own attention layers."""
    from sglang.srt.layers.radix_attention import RadixAttention

    options: dict[str, Any] = {"num_heads": 2, "head_dim": 64, "scaling": 1.0, "num_kv_heads": 1, "layer_id": 0}
    attributes = {
        "model": torch.nn.ModuleList([torch.nn.Linear(1, 1), RadixAttention(**options | (layer or {}))]),
        "sliding_window_size": None, "use_mla_backend": False, "kv_cache_dtype": torch.bfloat16,
        "dtype": torch.bfloat16, "spec_algorithm": SimpleNamespace(is_none=lambda: not speculative),
    }  # fmt: skip
    return SimpleNamespace(**attributes | given)


def test_causal_attention_is_served() -> None:
    check_attention(runner())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"sliding_window_size": 4096}, "sliding-window attention"),
        ({"layer": {"sliding_window_size": 1024}}, "sliding-window attention"),
        ({"use_mla_backend": True}, "multi-head latent attention"),
        ({"layer": {"logit_cap": 30.0}}, "a soft cap on attention's logits"),
        ({"layer": {"v_head_dim": 128}}, "values of another width"),
        ({"layer": {"is_cross_attention": True}}, "other than causal attention"),
        ({"speculative": True}, "speculative decoding"),
        ({"kv_cache_dtype": torch.float8_e4m3fn}, "a KV cache of torch.float8_e4m3fn for torch.bfloat16"),
    ],
)
def test_other_attention_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="mm_sparse does not serve") as refused:
        check_attention(runner(**given))
    assert named in str(refused.value)


def test_engines_are_checked_against_device_and_model() -> None:
    assert choose_engine("auto", "cpu").name == "reference"
    with pytest.raises(ValueError, match="engine='nonsense'"):
        choose_engine("nonsense", "cpu")
    check_engine(engine("reference"), torch.float32, 48)
    narrow = replace(engine("reference"), dtypes=(torch.bfloat16,), head_dims=(64, 128))
    with pytest.raises(ValueError, match="the model runs in torch.float32: needs one of"):
        check_engine(narrow, torch.float32, 64)
    with pytest.raises(ValueError, match=r"head_dim=48: needs one of \(64, 128\)"):
        check_engine(narrow, torch.bfloat16, 48)
