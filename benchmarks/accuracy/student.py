"""The trained model under a method: prompt rows sparse, answer rows dense, all vision work shared between methods.

Legend: N tokens of prompt and answer, P of the prompt, A of the answer, H heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.tiny_model.forward import use_fast_attention
from mm_sglang.choice import choose_engine
from mm_sglang.kernels.attend.reference import dense_rows
from mm_sglang.kernels.inspection import tile_counts_on_device
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import HeadPattern
from mm_sglang.kernels.prefill import sparse_prefill
from mm_sglang.layout import layout_from_processor
from mm_sglang.search.capture import Captured
from mm_sglang.search.exact import Exact

Inputs = Mapping[str, torch.Tensor]


def require_prompts(model: str, lengths: Sequence[int], density: float) -> None:
    """ValueError for a folder without a model, or prompts or a density that there can't be."""
    if not Path(model, "config.json").is_file():
        raise ValueError(f"{model}: no model folder")
    if min(lengths) < 256:
        raise ValueError(f"--lengths {min(lengths)}: needs at least 256 tokens")
    if not 0 < density <= 1:
        raise ValueError(f"--density {density}: needs a share above 0 and up to 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A sample ready for the text model: `inputs` of Captured.run for all N tokens, the layout of the first P."""

    inputs: dict[str, torch.Tensor]
    layout: TokenLayout
    answer: torch.Tensor  # int64 [A] on the device; token P + i is answer[i]

    def question(self) -> tuple[dict[str, torch.Tensor], TokenLayout]:
        """The first P tokens alone, for the search."""
        length = self.layout.length
        embeds, positions = self.inputs["inputs_embeds"], self.inputs["position_ids"]
        return {"inputs_embeds": embeds[:, :length], "position_ids": positions[..., :length]}, self.layout


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One forward pass: the answer's greedy tokens, and means over layers and heads."""

    tokens: list[int]
    correct: bool
    recall: float
    error: float
    density: float


# layer, prompt's q, k, v, scale -> a recipe a head
Recipes = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[HeadPattern, ...]]


class Student:
    """A Qwen2.5-VL in a folder, on a device."""

    def __init__(self, folder: str, device: str) -> None:
        self.held = Captured(folder, device)
        if self.held.config.architectures != ["Qwen2_5_VLForConditionalGeneration"]:
            raise ValueError(f"{folder}: architecture {self.held.config.architectures}: needs Qwen2.5-VL")
        use_fast_attention(self.held.model)
        self.device, self.engine = device, choose_engine("auto", device)

    @torch.no_grad()
    def prepare(self, inputs: Inputs) -> Prompt:
        """Vision tower, embeddings and positions, once for all methods.

        Args:
            inputs: of one prompt and its answer, as tiny_model's Encoder gives them: ids, labels (not shifted, -100 but
                at the answer), positions [3, 1, N], pixels and grids. What follows the answer is left out.

        Raises:
            ValueError: labels that are not the ids of one answer.
        """
        config, placed = self.held.config, {name: x.to(self.device) for name, x in inputs.items()}
        ids, labels = placed["input_ids"], placed["labels"][0].tolist()
        own = [n for n, label in enumerate(labels) if label >= 0]
        if not own or own[0] < 1 or labels[own[0] : own[-1] + 1] != ids[0, own[0] : own[-1] + 1].tolist():
            raise ValueError("labels: need a prompt, and then the ids of one answer, token for token")
        ids = ids[:, : own[-1] + 1]
        embeds = self.held.model.get_input_embeddings()(ids)
        for name, pixels, token in (
            ("image", "pixel_values", config.image_token_id), ("video", "pixel_values_videos", config.video_token_id),
        ):  # fmt: skip
            if pixels in placed:
                tower = self.held.model.model.visual  # takes the frames in slices: nothing of them is counted out here
                shown = tower(placed[pixels].to(embeds.dtype), grid_thw=placed[f"{name}_grid_thw"]).pooler_output
                embeds = embeds.masked_scatter((ids == token)[..., None], shown.to(embeds.dtype))
        layout = layout_from_processor(
            {name: x.cpu() for name, x in placed.items() if name.endswith(("_thw", "_ts"))} | {"input_ids": ids.cpu()},
            image_token_id=config.image_token_id, video_token_id=config.video_token_id,
            merge=config.vision_config.spatial_merge_size,
        )  # fmt: skip
        return Prompt(
            inputs={"inputs_embeds": embeds, "position_ids": placed["position_ids"][..., : own[-1] + 1]},
            layout=TokenLayout(items=layout.items, length=own[0], device=self.device),
            answer=ids[0, own[0] :],
        )

    def run(self, prompt: Prompt, recipes: Recipes | None, tail: int = 0) -> Outcome:
        """One forward pass; `recipes` None: dense attention, as transformers runs it; tail: of `sparse_prefill`."""
        length = prompt.layout.length
        measured: list[torch.Tensor] = []

        def look(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor | None:
            if recipes is None:
                return None
            pq, pk, pv = (x[:length].contiguous() for x in (q, k, v))
            out, lse, plan = sparse_prefill(
                pq, pk, pv, layout=prompt.layout, patterns=recipes(layer, pq, pk, pv, scale), scale=scale,
                engine=self.engine, tail=tail,
            )  # fmt: skip
            density = tile_counts_on_device(plan) / (plan.causal_tiles * plan.heads)
            exact = Exact(pq, pk, pv, scale, self.engine.ops())
            found = exact.recall(lse).mean(), exact.error(out).sum(), exact.norm().sum(), density.float()
            measured.append(torch.stack(found))
            # A server decodes the answer with its dense backend, so what stands for that here is dense too.
            answers = dense_rows(q, k, v, torch.arange(length, len(q), device=q.device), scale)
            return torch.cat([out, answers.to(out.dtype)])

        hidden = self.held.run(prompt.inputs, look)
        with torch.no_grad():
            chosen = self.held.model.lm_head(hidden[length - 1 : -1]).argmax(-1)
        correct = bool((chosen == prompt.answer).all())
        if not measured:
            return Outcome(tokens=chosen.tolist(), correct=correct, recall=1.0, error=0.0, density=1.0)
        share, wrong, norm, density = torch.stack(measured).double().mean(0).tolist()
        return Outcome(
            tokens=chosen.tolist(), correct=correct, recall=share, error=(wrong / max(norm, 1e-30)) ** 0.5,
            density=density,
        )  # fmt: skip
