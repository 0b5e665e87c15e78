"""A transformers model run once over a real video, every layer's q, k and v handed to a function as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.layout import layout_from_processor, require_known_architecture

NAME = "mm_sglang_search"
Look = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]  # layer, q, k, v [N, heads, D], scale
QUESTION = "What happens in this video? Describe it from the beginning to the end."


class Captured:
    """A model of a known architecture with its processor, on `device`."""

    def __init__(self, model: str, device: str) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        config = AutoConfig.from_pretrained(model)
        require_known_architecture(config.architectures)
        ALL_ATTENTION_FUNCTIONS.register(NAME, self._attention)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            model, dtype=dtype, attn_implementation={"text_config": NAME, "vision_config": "sdpa"}
        ).eval().to(device)  # fmt: skip
        self.processor: Any = AutoProcessor.from_pretrained(model)
        self.config, self.device = config, device
        self.look: Look | None = None

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
        """transformers' attention interface; query [1, H, N, D]. Dense, after `look` has seen it."""
        if self.look is not None:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
            self.look(module.layer_idx, q, k, v, scaling)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def prompt(self, video: Path) -> tuple[Any, TokenLayout]:
        """The processor's output for the video and a question, and its layout."""
        content = [{"type": "video", "video": str(video)}, {"type": "text", "text": QUESTION}]
        text = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.processor.chat_template, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        frames, metadata = sampled_frames(video)
        options: dict[str, Any] = {}
        if "Qwen3" in type(self.processor).__name__:
            options = {"video_metadata": [[metadata]], "do_sample_frames": False}
        inputs = self.processor(text=[text], videos=[frames], return_tensors="pt", **options)
        layout = layout_from_processor(
            inputs, image_token_id=self.config.image_token_id, video_token_id=self.config.video_token_id,
            merge=self.config.vision_config.spatial_merge_size,
        )  # fmt: skip
        return inputs, TokenLayout(items=layout.items, length=layout.length, device=self.device)

    def run(self, inputs: Any, look: Look) -> None:
        """One forward pass; `look` is called for every layer in order."""
        self.look = look
        try:
            with torch.no_grad():
                self.model.model(**inputs.to(self.device), use_cache=False)
        finally:
            self.look = None


def sampled_frames(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    """The frames that SGLang would sample from an mp4, [T, C, H, W], and their metadata."""
    from sglang.srt.multimodal.processors.qwen_vl import preprocess_video
    from sglang.srt.utils.video_decoder import VideoDecoderWrapper

    if not path.is_file():
        raise ValueError(f"video {path}: no such file")
    if not torch.cuda.is_available():
        from mm_sglang.compat import cpu_pin_memory

        cpu_pin_memory.install()
    frames, metadata = asyncio.run(preprocess_video(VideoDecoderWrapper(path.read_bytes())))
    return frames, metadata
