"""A transformers model that takes long prompts in bounded memory: rows of the text and frames of the video in pieces.

What grows with a prompt is then its residual stream, its vision embedding and one layer's q, k, v and output: for 7B at
a million tokens some 60 GB with the weights, where the MLPs alone would take 119 GB and the vision tower's 57.
Attention is whole in each layer, as it is what a search looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm_sglang.compat.vision_slices import PATCHES
from mm_sglang.parallel.vision import frame_shares, own_grids, patches, slices

ROWS = 32768  # of the text at once, as many as a server's chunk has


def bound(model: Any) -> None:
    """Wrap the parts of Qwen2.5-VL or Qwen3-VL whose temporaries grow with the prompt; pixels may stay on the host."""
    text = model.model.language_model
    for layer in text.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            _in_rows(part)
    _in_rows(text.norm)
    _in_slices(model.model.visual)


def _in_rows(module: Any) -> None:
    """[1, N, E] to [1, N, E], ROWS of N at a time."""
    original = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for first in range(0, x.shape[1], ROWS):
            out[:, first : first + ROWS] = original(x[:, first : first + ROWS])
        return out

    module.forward = forward


def _in_slices(tower: Any) -> None:
    """Whole frames, PATCHES at a time: each is attended by itself."""
    original = tower.forward

    def forward(x: torch.Tensor, grid_thw: torch.Tensor, **options: Any) -> Any:
        if whole := [name for name, value in options.items() if isinstance(value, torch.Tensor)]:
            raise ValueError(f"{', '.join(whole)}: of all frames, which are taken in slices: needs grid_thw alone")
        grids, made, first = grid_thw.tolist(), [], 0
        for part in slices(grids, frame_shares(grids, 1)[0], PATCHES):
            grid = torch.tensor(own_grids(grids, part), device=tower.device)
            last = first + patches(grids, part)
            made.append(original(x[first:last].to(tower.device), grid_thw=grid, **options))
            first = last
        return type(made[0])(**{name: _joined([getattr(one, name) for one in made]) for name in made[0]})

    tower.forward = forward


def _joined(parts: Sequence[Any]) -> Any:
    """Tensors one after another, and so the lists of tensors that Qwen3-VL's deepstack has."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(list(parts))
    return [torch.cat(list(of_layer)) for of_layer in zip(*parts, strict=True)]
