"""The yardstick of the parity tests: Hugging Face transformers on the same content parts, greedy, fp32.

SGLang's own frame sampling is used (it decides which frames a model sees); everything after it is transformers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mm_sglang.demo.client import Part
from mm_sglang.search.videos import sampled_frames


class HuggingFace:
    """One model folder, loaded once."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # the servers are asked to ignore it too

    def inputs(self, parts: Sequence[Part]) -> Any:
        """The processor's BatchFeature for one user message of these parts."""
        from PIL import Image

        content = [{"type": kind, kind: str(value)} for kind, value in parts]
        prompt = self.processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        images = [Image.open(value).convert("RGB") for kind, value in parts if kind == "image"]
        sampled = [sampled_frames(Path(value)) for kind, value in parts if kind == "video"]
        options: dict[str, Any] = {}
        if sampled and "Qwen3" in type(self.processor).__name__:
            options = {"video_metadata": [[m for _, m in sampled]], "do_sample_frames": False}
        return self.processor(
            text=[prompt],
            images=images or None,
            videos=[frames for frames, _ in sampled] or None,
            return_tensors="pt",
            **options,
        )

    def greedy(self, parts: Sequence[Part], tokens: int) -> list[int]:
        inputs = self.inputs(parts).to(self.model.device)
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        ids: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return ids
