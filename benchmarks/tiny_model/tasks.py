"""Synthetic long-video tasks whose answers can be read off the frames and the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.tiny_model import visual
from benchmarks.tiny_model.mixed import codes, mm_niah
from benchmarks.tiny_model.plans import Plan, Request
from benchmarks.tiny_model.scenes import Clip, render

PLANNERS: dict[str, Callable[[Request], Plan]] = {
    "v_niah": visual.v_niah,
    "mm_niah": mm_niah,
    "tracking": visual.tracking,
    "order": visual.order,
    "counting": visual.counting,
    "caption": visual.caption,
    "codes": codes,
}
# "codes" is for training alone
TASKS: tuple[str, ...] = ("v_niah", "mm_niah", "tracking", "order", "counting", "caption")


@dataclass(frozen=True, eq=False)
class Sample:
    """One context with questions; `seconds` holds a number for each video: from one pair of frames to the next."""

    task: str
    parts: tuple[tuple[str, Any], ...]  # ("text", str) | ("image", uint8 [3, H, W]) | ("video", uint8 [T, 3, H, W])
    turns: tuple[tuple[str, str], ...]  # (question, answer)
    depth: float  # of the needle asked for first, 0 to 1
    seconds: tuple[float, ...] = ()


def make_plan(
    task: str,
    *,
    tokens: int,
    seed: int,
    split: str,
    depth: float | None = None,
    turns: int = 1,
    shape_seed: int | None = None,
) -> Plan:
    """make_sample before drawing; plans of the same task, tokens, split, turns and shape_seed have clips of one shape.

    Raises:
        ValueError: an unknown task or split, a depth outside 0 to 1, no turn, fewer tokens than plans.least_tokens.
    """
    if task not in PLANNERS:
        raise ValueError(f"task={task!r}: needs one of {tuple(PLANNERS)}")
    request = Request(task, tokens, seed, split, depth, turns, seed if shape_seed is None else shape_seed)
    return PLANNERS[task](request)


def make_sample(
    task: str, *, tokens: int, seed: int, split: str, depth: float | None = None, turns: int = 1, device: str = "cpu"
) -> Sample:
    """A sample of about `tokens` LLM tokens, never more, its frames drawn on `device`.

    Args:
        split: "train" or "test": other random sources, and other pairs of background and direction of motion.
        depth: where the needle asked for first lies, as nearly as frames and sentences allow; None for anywhere.
        turns: questions wanted; a short context or a task with fewer possible ones gives fewer.

    Raises:
        ValueError: an unknown task or split, a depth outside 0 to 1, no turn, fewer tokens than plans.least_tokens.
    """
    return drawn(make_plan(task, tokens=tokens, seed=seed, split=split, depth=depth, turns=turns), device)


def drawn(plan: Plan, device: str) -> Sample:
    """The plan with its frames in place of their descriptions."""
    parts: list[tuple[str, Any]] = []
    for kind, part in plan.parts:
        if isinstance(part, Clip):
            frames = render([part], device)
            parts.append((kind, frames if kind == "video" else frames[0]))
        else:
            parts.append((kind, part))
    seconds = tuple(clip.seconds for clip in plan.clips if clip.frames > 1)
    return Sample(plan.task, tuple(parts), tuple(plan.turns), plan.depth, seconds)
