"""A transformers model run over a prompt, each layer's q, k and v handed to a function that may attend in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.layout import layout_from_processor, require_known_architecture
from mm_sglang.search.bounded import bound
from mm_sglang.search.videos import sampled_frames

NAME = "mm_sglang_search"
# layer, q, k, v [N, heads, D], scale -> attention's output [N, H, D], or None: dense attention then
Look = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor | None]
QUESTION = "What happens in this video? Describe it from the beginning to the end."


class Captured:
    """A model of a known architecture with its processor, on `device`."""

    def __init__(self, model: str, device: str) -> None:
        from transformers import AutoModelForImageTextToText
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = known_config(model)
        name = f"{NAME}_{id(self):x}"  # the table is transformers' own: a second model must not take the first one's
        ALL_ATTENTION_FUNCTIONS.register(name, self._attention)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, attn_implementation={"text_config": name, "vision_config": "sdpa"}
        ).eval().to(device)  # fmt: skip
        bound(self.model)
        self.folder, self.config, self.device = model, config, device
        self.look: Look | None = None

    @cached_property
    def processor(self) -> Any:
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.folder)

    @property
    def layers(self) -> int:
        return int(self.config.text_config.num_hidden_layers)

    @property
    def heads(self) -> int:
        return int(self.config.text_config.num_attention_heads)

    def _attention(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float = 1.0,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """transformers' attention interface; query [1, H, N, D]. Dense unless `look` gives an output."""
        if self.look is not None:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            given = self.look(module.layer_idx, q, k, v, scaling)
            if given is not None:
                return given[None], None
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def prompt(self, video: Path, limits: Mapping[str, Any]) -> tuple[Any, TokenLayout]:
        """The processor's output for the video and a question, and its layout; limits: see `sampled_frames`."""
        content = [{"type": "video", "video": str(video)}, {"type": "text", "text": QUESTION}]
        text = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.processor.chat_template, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        frames, metadata = sampled_frames(video, limits)
        options: dict[str, Any] = {}
        if "Qwen3" in type(self.processor).__name__:
            options = {"video_metadata": [[metadata]], "do_sample_frames": False}
        if "size" in limits:  # of the processor, after the frames' own
            options["size"] = limits["size"]
        inputs = self.processor(text=[text], videos=[frames], return_tensors="pt", **options)
        if self.config.model_type == "qwen2_5_vl":
            inputs["position_ids"] = self._served_positions(inputs)
        layout = layout_from_processor(
            inputs, image_token_id=self.config.image_token_id, video_token_id=self.config.video_token_id,
            merge=self.config.vision_config.spatial_merge_size,
        )  # fmt: skip
        return inputs, TokenLayout(items=layout.items, length=layout.length, device=self.device)

    def _served_positions(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """int64 [3, 1, N] as SGLang counts them, since it is in SGLang that the patterns will run.

        After a long video text goes on behind its last frame there; transformers 5.19 goes on behind its height or
        width (Qwen2_5_VLModel.get_rope_index), so that a question at the end stands among the first frames.
        """
        from sglang.srt.layers.rotary_embedding import MRotaryEmbedding

        positions: torch.Tensor = MRotaryEmbedding.get_rope_index(
            spatial_merge_size=self.config.vision_config.spatial_merge_size, image_token_id=self.config.image_token_id,
            video_token_id=self.config.video_token_id, vision_start_token_id=self.config.vision_start_token_id,
            model_type=self.config.model_type, tokens_per_second=self.config.vision_config.tokens_per_second,
            input_ids=inputs["input_ids"], video_grid_thw=inputs["video_grid_thw"],
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
        )[0]  # fmt: skip
        return positions

    def run(self, inputs: Mapping[str, torch.Tensor], look: Look) -> torch.Tensor:
        """One forward pass; `look` is called for every layer in order. Hidden states [N, E] after the last norm.

        Args:
            inputs: of the text model's parent: ids and pixels, or inputs_embeds and position_ids made before.
        """
        self.look = look
        try:
            with torch.no_grad():
                # pixels, 19 GB for a million tokens, go to the device slice by slice
                placed = {n: x if n.startswith("pixel") else x.to(self.device) for n, x in inputs.items()}
                out = self.model.model(**placed, use_cache=False)
        finally:
            self.look = None
        return out.last_hidden_state[0]  # type: ignore[no-any-return]


def known_config(model: str) -> Any:
    """transformers' configuration of a folder or name; ValueError if there is none, or of an unknown architecture."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise ValueError(f"model {model}: {' '.join(str(error).split())[:200]}") from error
    require_known_architecture(config.architectures)
    return config
