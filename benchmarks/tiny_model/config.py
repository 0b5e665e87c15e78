"""Sizes of the model and the stages of its training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """transformers takes hidden / heads for a head's width, so hidden is heads * 64."""

    heads: int = 8
    kv_heads: int = 2
    layers: int = 5
    intermediate: int = 512
    vision_hidden: int = 256
    vision_heads: int = 4  # a head's width of 64, and a number that tensor parallelism can divide
    vision_depth: int = 4
    vision_intermediate: int = 512
    vision_full: tuple[int, ...] = (1, 3)

    @property
    def hidden(self) -> int:
        return self.heads * 64


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the curriculum; its learning rate follows a half cosine from `lr` to `lr_end` over `minutes`."""

    minutes: float
    lr: float
    lr_end: float
    lengths: dict[int, float]  # tokens of a context: share of the micro-batches
    micro_tokens: int = 8192  # a step holds as many contexts as fit, one at least
    micros: int = 16  # steps of a round, whose frames are encoded together (look.py: micro-batches of a step)
    round_tokens: int = 131072  # at most, beyond one step
    warmup_steps: int = 100
    tasks: dict[str, float] | None = None  # shares; None for the config's
    enough: float = math.inf  # share of right first tokens at which the stage ends before its time
    near: float = 0.0  # share of a token's distance to its words in the vision tower's loss (look.py)


@dataclass(frozen=True, kw_only=True)
class Config:
    stages: dict[str, Stage]
    sizes: Sizes = field(default_factory=Sizes)
    tasks: dict[str, float] = field(
        default_factory=lambda: {
            "v_niah": 1.2, "mm_niah": 2.5, "tracking": 1.2, "order": 1.2, "counting": 1.2, "caption": 2.0,
            "codes": 0.3,
        }
    )  # fmt: skip
    turns: int = 24
    photographs: bool = True
    perfect_tower: bool = False  # perfect.py in place of the vision tower, which then is never trained
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    workers: int = 12
    valid_lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072)
    valid_samples: int = 16
    seed: int = 1


SEEN = {"v_niah": 1.0, "tracking": 0.7, "order": 0.3, "counting": 0.2, "caption": 0.2}  # without images
DETAILS = {"caption": 2.0, "counting": 0.7, "tracking": 1.0, "v_niah": 1.0}
SAID = {"caption": 4.0, "counting": 0.8, "tracking": 1.0, "v_niah": 1.0, "order": 0.4}
NEEDLES = {
    "v_niah": 2.0, "mm_niah": 4.0, "tracking": 1.2, "order": 1.2, "counting": 1.2, "caption": 1.5, "codes": 0.3,
}  # fmt: skip

CONFIGS = {
    "h200": Config(
        stages={
            # The vision tower first (look.py): only what is seen can be retrieved.
            "look": Stage(
                minutes=3.5, lr=1e-3, lr_end=1e-4, warmup_steps=50, lengths={1024: 1.0}, micro_tokens=12288, micros=4,
                tasks=SEEN,
            ),
            # Big frames are in long contexts only: a glyph over 6 x 6 tokens of 12 x 12 was misread once in eight.
            "look closer": Stage(
                minutes=2.1, lr=1e-3, lr_end=2e-5, warmup_steps=50, lengths={1024: 0.4, 4096: 0.6}, micro_tokens=12288,
                micros=4, tasks=SEEN,
            ),
            "look at details": Stage(
                minutes=5.5, lr=1e-3, lr_end=3e-5, warmup_steps=50, lengths={1024: 0.5, 4096: 0.5}, micro_tokens=12288,
                micros=4, tasks=DETAILS,
            ),
            "look and say": Stage(
                minutes=2.5, lr=1e-4, lr_end=2e-6, warmup_steps=100, lengths={512: 0.3, 1024: 0.3, 4096: 0.4},
                micro_tokens=12288, micros=2, tasks=SAID, near=1.0,
            ),
            # Looking codes up takes a step more than looking frames up, and hardly comes once those are learnt. No
            # longer than that: steps that have nothing left to learn undo what the others start from.
            "words": Stage(
                minutes=0.3, lr=4e-4, lr_end=4e-4, lengths={128: 0.7, 256: 0.3}, micro_tokens=4096, micros=4,
                tasks={"codes": 1.0}, enough=0.6,
            ),
            # All tasks from the beginning: layers that had learnt needles took up nothing more.
            "short": Stage(
                minutes=1.8, lr=4e-4, lr_end=4e-4, micro_tokens=4096,
                lengths={64: 0.05, 128: 0.1, 256: 0.25, 512: 0.3, 1024: 0.2, 2048: 0.1},
            ),
            "medium": Stage(
                minutes=2.0, lr=4e-4, lr_end=4e-4,
                lengths={256: 0.1, 512: 0.15, 1024: 0.2, 2048: 0.2, 4096: 0.15, 8192: 0.12, 16384: 0.08},
            ),
            "long": Stage(
                minutes=2.1, lr=4e-4, lr_end=3e-4,
                lengths={512: 0.1, 1024: 0.1, 4096: 0.2, 8192: 0.15, 16384: 0.2, 32768: 0.1, 65536: 0.1, 131072: 0.05},
            ),
            "far": Stage(
                minutes=2.4, lr=3e-4, lr_end=1e-5, tasks=NEEDLES,
                lengths={1024: 0.1, 4096: 0.15, 8192: 0.1, 16384: 0.15, 65536: 0.2, 131072: 0.3},
            ),
        }
    ),
    "perfect tower": Config(
        stages={
            "words": Stage(minutes=2.5, lr=8e-4, lr_end=8e-4, lengths={128: 0.7, 256: 0.3}, micro_tokens=768, micros=8,
                           round_tokens=8192, warmup_steps=30, tasks={"codes": 1.0}),
            "short": Stage(minutes=7, lr=8e-4, lr_end=4e-4, lengths={256: 0.5, 512: 0.5}, micro_tokens=1024, micros=8,
                           round_tokens=8192, warmup_steps=30),
        },
        sizes=Sizes(heads=4, intermediate=256, vision_hidden=64, vision_heads=1, vision_depth=2,
                    vision_intermediate=64, vision_full=(1,)),
        turns=8, perfect_tower=True, workers=0, valid_lengths=(),
    ),
    "smoke": Config(
        stages={"short": Stage(minutes=5, lr=2e-3, lr_end=1e-3, lengths={64: 0.4, 80: 0.3, 112: 0.3},
                        micro_tokens=1760, micros=4, round_tokens=8192)},
        sizes=Sizes(heads=2, kv_heads=1, layers=3, intermediate=256, vision_hidden=64, vision_heads=1, vision_depth=2,
                    vision_intermediate=128, vision_full=(1,)),
        tasks={"v_niah": 1.0}, turns=4, photographs=False, workers=1, valid_lengths=(64, 80, 112), valid_samples=64,
    ),
}  # fmt: skip
