"""What a vision tower that never errs would say: to try out on a CPU core how the language model learns.

python -m benchmarks.tiny_model.train --config "perfect tower" --folder F --minutes 10
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.tiny_model.batches import Batch
from benchmarks.tiny_model.look import labels, spoken, summed
from benchmarks.tiny_model.scenes import Clip

NOISE = 0.25  # of the embeddings' deviation, in every token


def said(batch: Batch, embeddings: torch.Tensor, number: Callable[[str], int]) -> torch.Tensor:
    """What each token of the frames says, in the words' own embeddings, [B, N, hidden]; 0 at tokens of text."""
    words = spoken(embeddings.cpu(), number)
    noise = NOISE * embeddings.detach().std().cpu()
    out = torch.zeros(*batch.tensors["input_ids"].shape, embeddings.shape[1])
    for row, vision in enumerate(batch.tensors["mm_token_type_ids"] > 0 if batch.clips else ()):
        out[row, vision] = torch.cat([_said(shown[row], words, noise) for shown in batch.clips])
    return out.to(embeddings)


def _said(clip: Clip, words: dict[str, torch.Tensor], noise: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden] of one clip."""
    pairs, hidden = clip.grid[0], words["border"].shape[1]
    tokens = noise * torch.randn(pairs, clip.tokens // pairs, hidden)
    for pair in {stamp[0] // 2 for stamp in clip.stamps}:
        tokens[pair] += summed(labels(clip.pair(pair)), words)
    return tokens.flatten(0, 1)
