"""Vision embeddings, mrope positions and deepstack of Qwen2.5-VL and Qwen3-VL under context parallelism.

Why: on a context-parallel batch the runner does not call the model's forward but embeds `input_ids` itself, which hold
    hashes above the vocabulary where vision is, with plain positions and without deepstack.
How: it asks the model for `prepare_cp_inputs` first, which only GLM has. These two get one, on the instance: SGLang's
    own `prepare_mm_inputs` on the whole batch, as in their forward, before the runner shards rows and positions;
    Qwen3-VL's deepstack rows are sharded here. Every rank takes part in the vision tower as SGLang lays it out.
Upstream: sglang/srt/model_executor/runner/eager_runner.py _execute_extend_cp; models/glm5_next.py prepare_cp_inputs;
    models/qwen2_5_vl.py, qwen3_vl.py forward.
Versions: 0.5.23. Remove when both have the method.
"""

from __future__ import annotations

from functools import partial
from typing import Any

MODELS = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")
DEEPSTACK = "input_deepstack_embeds"


def _prepare(model: Any, forward_batch: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Embeddings [T, hidden], positions [3, T] and further arguments of the body, before its rows are sharded."""
    from sglang.srt.layers.cp.utils import cp_shard_hidden_states
    from sglang.srt.managers.mm_utils import prepare_mm_inputs

    given = kwargs.pop("input_embeds", None)
    if given is not None:
        raise ValueError("input_embeds with context parallelism: needs input_ids")
    embeds = prepare_mm_inputs(
        forward_batch.input_ids, forward_batch, model.model, kwargs, multimodal_model=model,
        use_deepstack=getattr(model, "use_deepstack", {}),
    )  # fmt: skip
    if kwargs.get(DEEPSTACK) is not None:
        kwargs[DEEPSTACK] = cp_shard_hidden_states(kwargs[DEEPSTACK], forward_batch)
    positions = forward_batch.mrope_positions if model.is_mrope_enabled else forward_batch.positions
    return embeds, positions, kwargs


def install(model: Any) -> None:
    """Give the loaded model the method, or ValueError if it is not one whose forward was read for this."""
    name = type(model).__name__
    if name not in MODELS:
        raise ValueError(f"context parallelism for {name}: needs one of {MODELS}")
    model.prepare_cp_inputs = partial(_prepare, model)
