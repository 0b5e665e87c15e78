"""Batches of plans of one shape, made in worker processes; their frames are drawn where the model is.

Shapes: B prompts, N tokens (right padded), A answer tokens of the batch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.tiny_model.config import Config, Stage
from benchmarks.tiny_model.inputs import IGNORED, Encoder, Grid, Text
from benchmarks.tiny_model.plans import Plan, least_tokens
from benchmarks.tiny_model.scenes import Clip, render
from benchmarks.tiny_model.tasks import make_plan
from benchmarks.tiny_model.words import tokenizer

SEED_STRIDE = 1 << 20  # seeds of one micro-batch
# Prompts of a test that share resolution, length and frame rate: a cell of one shape would judge that shape.
SAME_SHAPE = 2
TEST_TOKENS = 1 << 17  # of a test's batch


@dataclass
class Batch:
    """B prompts of one task whose clips have the same shapes."""

    task: str
    length: int
    tensors: dict[str, torch.Tensor]  # input_ids, mm_token_type_ids [B, N]; position_ids [3, B, N]; the rest [A]
    clips: list[list[Clip]]  # the first clip of all prompts, then the second of all, ...
    kinds: list[str]
    depths: list[float]
    turns: int  # in all prompts together

    @property
    def grids(self) -> list[Grid]:
        return [shown[0].grid for shown in self.clips]

    def to_model(self, encoder: Encoder, *, photographs: bool) -> dict[str, Any]:
        """What forward.answer_logits takes, on the encoder's device; draws and processes the frames."""
        pixels = [
            encoder.pixels(render(shown, encoder.device, photographs=photographs), video=kind == "video")
            for shown, kind in zip(self.clips, self.kinds, strict=True)
        ]
        moved = {name: value.to(encoder.device, non_blocking=True) for name, value in self.tensors.items()}
        return {**moved, "pixels": torch.cat(pixels) if pixels else None, "grids": self.grids, "kinds": self.kinds}


def collate(plans: Sequence[Plan], length: int, text: Text) -> Batch:
    """Tokenise and pad `plans`, whose clips have the same shapes in the same order."""
    rows = []
    for plan in plans:
        parts = [(kind, part.grid if isinstance(part, Clip) else part) for kind, part in plan.parts]
        seconds = [clip.seconds for clip in plan.clips if clip.frames > 1]
        rows.append(text(parts, plan.turns, seconds, answers=True))
        assert len(rows[-1]["input_ids"]) <= length, (plan.task, length, len(rows[-1]["input_ids"]))
    longest = max(len(row["input_ids"]) for row in rows)
    pad = text.ids["<|endoftext|>"]

    def padded(name: str, value: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.stack(
            [
                np.pad(row[name], [(0, 0)] * (row[name].ndim - 1) + [(0, longest - row[name].shape[-1])],
                       constant_values=value)
                for row in rows
            ]
        )  # fmt: skip

    labels = padded("labels", IGNORED)
    answers = labels != IGNORED
    begins = answers & ~np.pad(answers, ((0, 0), (1, 0)))[:, :-1]
    tensors = {
        "input_ids": padded("input_ids", pad),
        "mm_token_type_ids": padded("mm_token_type_ids", 0),
        "position_ids": padded("position_ids", 0).transpose(1, 0, 2).copy(),
        "predicts": np.flatnonzero(answers) - 1,
        "targets": labels[answers],
        "turn": begins.ravel().cumsum()[answers.ravel()] - 1,
    }
    kinds = [kind for kind, part in plans[0].parts if isinstance(part, Clip)]
    clips = [list(shown) for shown in zip(*(plan.clips for plan in plans), strict=True)]
    made = {name: torch.from_numpy(value) for name, value in tensors.items()}
    return Batch(plans[0].task, length, made, clips, kinds, [plan.depth for plan in plans], int(begins.sum()))


def plan_batch(
    text: Text,
    task: str,
    length: int,
    count: int,
    *,
    seed: int,
    split: str,
    turns: int,
    depth: float | None = None,
) -> Batch:
    """`count` prompts of one task and shape."""
    plans = [
        make_plan(task, tokens=length, seed=seed + n, split=split, turns=turns, depth=depth, shape_seed=seed)
        for n in range(count)
    ]
    return collate(plans, length, text)


def at_once(samples: int, length: int) -> int:
    """Prompts of a batch when `samples` of a length are tested."""
    return max(1, min(samples, SAME_SHAPE, TEST_TOKENS // length))


class MicroBatches(torch.utils.data.Dataset[Batch]):
    """The training's micro-batches by number: the same number gives the same batch in every run."""

    def __init__(self, config: Config, stage: Stage) -> None:
        self.config, self.stage = config, stage
        self.text: Text | None = None

    def __getitem__(self, number: int) -> Batch:
        if self.text is None:  # made in the worker
            self.text = Text(tokenizer())
        choice = random.Random(f"{self.config.seed}/{number}")
        length = choice.choices(list(self.stage.lengths), list(self.stage.lengths.values()))[0]
        shares = self.stage.tasks or self.config.tasks
        tasks = {task: share for task, share in shares.items() if length >= least_tokens(task)}
        task = choice.choices(list(tasks), list(tasks.values()))[0]
        count = max(1, self.stage.micro_tokens // length)
        seed = (self.config.seed * 1_000_003 + number) * SEED_STRIDE
        return plan_batch(self.text, task, length, count, seed=seed, split="train", turns=self.config.turns)


def loader(config: Config, stage: Stage, first: int) -> Any:
    """An endless iterator over MicroBatches from number `first`."""
    return endless(MicroBatches(config, stage), config.workers, first)


def endless(made: torch.utils.data.Dataset[Any], workers: int, first: int) -> Any:
    """An endless iterator over `made` from number `first`, in worker processes."""
    return iter(
        torch.utils.data.DataLoader(
            made,
            batch_size=None,
            sampler=range(first, first + (1 << 40)),
            num_workers=workers,
            prefetch_factor=6 if workers else None,
        )
    )
