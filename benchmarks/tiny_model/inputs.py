"""Token ids, labels and rotary positions of a sample, and its pixels through the real processors.

Positions are the original Qwen2.5-VL's and SGLang's: text goes on after the largest position of a video. transformers
5.19 goes on after its height and width alone (`current_pos += max(h, w)`), which puts the question among the frames;
so the encoder hands `position_ids` along, which its forward takes as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.tiny_model.plans import TOKENS_PER_SECOND
from benchmarks.tiny_model.tasks import Sample
from mm_sglang.demo.tiny_model import SPECIAL

MERGE = 2
IGNORED = -100
Ints = npt.NDArray[np.int64]
Grid = tuple[int, int, int]  # in patches


class Text:
    """Prompts without pixels: what worker processes need."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in (*SPECIAL, "assistant")}

    def __call__(
        self,
        parts: Sequence[tuple[str, str | Grid]],
        turns: Sequence[tuple[str, str]],
        seconds: Sequence[float],
        *,
        answers: bool,
    ) -> dict[str, Ints]:
        """input_ids, mm_token_type_ids, labels [N] and position_ids [3, N]; a part is a text or a clip's grid.

        `answers=False` stops where the assistant answers the first question. Labels are not shifted.
        """
        content = [{"type": kind, "text": part} for kind, part in parts] + [{"type": "text", "text": turns[0][0]}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answers:
            for number, (question, answer) in enumerate(turns):
                if number:
                    messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answers)
        short = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        repeats = np.ones_like(short)
        kinds = np.zeros_like(short)
        for kind, name in ((1, "image"), (2, "video")):
            grids = [part for modality, part in parts if modality == name and not isinstance(part, str)]
            at = np.flatnonzero(short == self.ids[f"<|{name}_pad|>"])
            kinds[at] = kind
            repeats[at] = [t * h * w // MERGE**2 for t, h, w in grids]
        ids = np.repeat(short, repeats)
        items = [(kind, part) for kind, part in parts if not isinstance(part, str)]
        starts = (np.cumsum(repeats) - repeats)[kinds > 0]
        return {
            "input_ids": ids,
            "mm_token_type_ids": np.repeat(kinds, repeats),
            "labels": self._labels(ids),
            "position_ids": positions(len(ids), starts.tolist(), items, seconds),
        }

    def _labels(self, ids: Ints) -> Ints:
        """The assistant's tokens and the mark that ends them; IGNORED elsewhere."""
        labels = np.full_like(ids, IGNORED)
        heads = np.flatnonzero((ids[:-1] == self.ids["<|im_start|>"]) & (ids[1:] == self.ids["assistant"])) + 3
        ends = np.flatnonzero(ids == self.ids["<|im_end|>"])
        for head in heads.tolist():
            following = ends[ends >= head]
            if len(following):
                labels[head : following[0] + 1] = ids[head : following[0] + 1]
        return labels


def positions(length: int, starts: Sequence[int], items: Sequence[tuple[str, Grid]], seconds: Sequence[float]) -> Ints:
    """Rotary positions (time, row, column) as SGLang computes them, [3, N].

    Args:
        starts: the first token of each image or video.
        items: their modalities and grids in patches.
        seconds: for each video, from one pair of frames to the next.
    """
    out = np.empty((3, length), np.int64)
    at = position = 0
    waits = iter(seconds)
    for start, (kind, (t, h, w)) in zip(starts, items, strict=True):
        out[:, at:start] = np.arange(position, position + start - at)
        position += start - at
        h, w = h // MERGE, w // MERGE
        interval = next(waits) * TOKENS_PER_SECOND if kind == "video" else 1.0
        at = start + t * h * w
        axes = np.meshgrid((np.arange(t) * interval).astype(np.int64), np.arange(h), np.arange(w), indexing="ij")
        out[:, start:at] = np.stack(axes).reshape(3, -1) + position
        position = int(out[:, start:at].max()) + 1
    out[:, at:] = np.arange(position, position + length - at)
    return out


class Encoder:
    """Samples as the model takes them.

    Args:
        folder: of a model: tokenizer and processor files.
        device: where the results are.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoTokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

        self.device = device
        self.text = Text(AutoTokenizer.from_pretrained(folder))
        self.images: Any = Qwen2VLImageProcessor.from_pretrained(folder)
        self.videos: Any = Qwen2VLVideoProcessor.from_pretrained(folder)

    def pixels(self, frames: torch.Tensor, *, video: bool) -> torch.Tensor:
        """Patches [P, 1176] of a video [T, 3, H, W] (several of one shape may stand one after another) or of images."""
        frames = frames.to(self.device)
        if video:
            made = self.videos(videos=[frames], cap_pixels_per_frame=False, return_tensors="pt", device=self.device)
            return made["pixel_values_videos"]  # type: ignore[no-any-return]
        made = self.images(images=list(frames), return_tensors="pt", device=self.device)
        return made["pixel_values"]  # type: ignore[no-any-return]

    def __call__(self, sample: Sample, *, answers: bool) -> dict[str, torch.Tensor]:
        """One prompt: input_ids, mm_token_type_ids [1, N], position_ids [3, 1, N], pixels, grids; labels if `answers`.

        Without answers it ends where the assistant answers the first question.
        """
        parts: list[tuple[str, str | Grid]] = []
        values: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
        grids: dict[str, list[Grid]] = {"image": [], "video": []}
        for kind, part in sample.parts:
            if kind != "text":
                frames = part if kind == "video" else part[None]
                count, _, high, wide = frames.shape
                values[kind].append(self.pixels(frames, video=kind == "video"))
                part = ((count + 1) // 2, high // 14, wide // 14)
                grids[kind].append(part)
            parts.append((kind, part))
        seconds = sample.seconds or (1.0,) * len(grids["video"])
        made = self.text(parts, sample.turns, seconds, answers=answers)
        out = {name: torch.from_numpy(value).to(self.device) for name, value in made.items()}
        out = {name: value[:, None] if value.ndim == 2 else value[None] for name, value in out.items()}
        if not answers:
            del out["labels"]
        for kind, suffix in (("image", ""), ("video", "_videos")):
            if values[kind]:
                out[f"pixel_values{suffix}"] = torch.cat(values[kind])
                out[f"{kind}_grid_thw"] = torch.tensor(grids[kind], device=self.device)
        if values["video"]:
            out["second_per_grid_ts"] = torch.tensor(seconds, device=self.device)
        return out
