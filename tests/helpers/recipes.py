"""A prompt of every kind of item, every pattern inside every boundary, and the chunk shapes to try them on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from mm_sglang.kernels.layout import IMAGE, VIDEO, consume_grids
from mm_sglang.kernels.plan import HeadGroup, Plan

# Text, an image, a video of one span, text, a Qwen3-VL video (a span a frame, timestamps between), text.
ITEMS = (
    *consume_grids(IMAGE, [(1, 8, 12)], [(20, 44)], 2),
    *consume_grids(VIDEO, [(6, 10, 14)], [(50, 260)], 2),
    *consume_grids(VIDEO, [(5, 8, 8)], [(270, 286), (290, 306), (310, 326), (330, 346), (350, 366)], 2),
)
SLASH: dict[str, Any] = {
    "pattern": "vertical_slash",
    "columns": 37,
    "slashes": 128,
    "sink": 3,
    "local": 4,
    "last_q": 17,
}
FRAME: dict[str, Any] = {"pattern": "grid", "stride": "frame", "lines": 3, "sink": 4, "local": 20, "last_q": 64}
BLOCKS: dict[str, Any] = {"pattern": "block_topk", "blocks": 3, "sink": 1, "local": 1}
COLUMN_BLOCKS: dict[str, Any] = {
    "pattern": "column_blocks", "columns": 150, "blocks": 2, "sink": 3, "local": 1, "last_q": 17,
}  # fmt: skip
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "dense"},
    "a_shape": {"pattern": "a_shape", "sink": 5, "local": 40},
    "vertical_slash": SLASH,
    "vertical_slash_coverage": SLASH | {"coverage": 0.6, "columns": 300},
    "grid_frame": FRAME,
    "grid_row_vertical": FRAME
    | {"stride": "row", "lines": 20, "horizontal": False, "sink": 0, "local": 1, "last_q": 5},
    "grid_horizontal": FRAME | {"vertical": False, "lines": 2, "sink": 0, "local": 30, "last_q": 33},
    "grid_auto": FRAME | {"stride": "auto", "text": False, "horizontal": False},
    "block_topk": BLOCKS,
    "block_topk_clusters": BLOCKS | {"score": "clusters", "coverage": 0.9},
    "block_topk_least": BLOCKS | {"score": "clusters", "blocks": 4, "least": 0.9},
    "block_topk_antidiagonal": BLOCKS | {"score": "antidiagonal", "coverage": 0.9},
    "column_blocks": COLUMN_BLOCKS,
}
RECIPES: dict[str, dict[str, Any]] = PATTERNS | {
    "k_slash": SLASH | {"boundary": "k"},
    "k_blocks": BLOCKS | {"boundary": "k"},
    "k_column_blocks": COLUMN_BLOCKS | {"boundary": "k"},
    "q_column_blocks": COLUMN_BLOCKS | {"boundary": "q"},
    "q_slash": SLASH | {"boundary": "q"},
    "q_grid": FRAME | {"boundary": "q"},
    "q_dense": {"pattern": "dense", "boundary": "q"},
    "2d_a_shape": {"pattern": "a_shape", "sink": 30, "local": 40, "boundary": "2d"},
    "2d_slash": SLASH | {"boundary": "2d"},
    "2d_column_blocks": COLUMN_BLOCKS | {"boundary": "2d"},
    "2d_mixed": {
        "boundary": "2d",
        "parts": {
            "text->text": {"pattern": "dense"}, "text->vision": BLOCKS,
            "vision->text": SLASH, "vision->vision": FRAME | {"horizontal": False},
        },
    },
}  # fmt: skip
# (prefix, queries): whole prompts of odd lengths, one tile and less, chunks that start and end inside a frame,
# a radix hit that leaves a few tokens, one query.
SHAPES = [(0, 1), (0, 77), (0, 128), (0, 611), (100, 129), (256, 355), (300, 7), (610, 1)]


SHARED = 5.0  # how many times a quiet machine's time things may take here: other tests run beside them
TOKENS = 8  # greedy ones that servers are compared by
MUCH = 10**6
# Every pattern at once, each with a budget that covers every key: all of the machinery runs and changes nothing.
COVERING: dict[str, Any] = {
    "default": {"pattern": "vertical_slash", "columns": MUCH, "slashes": MUCH},
    "layers": {
        "1": {"default": {"pattern": "grid", "lines": MUCH}, "heads": {"2": {"pattern": "dense"}}},
        "2": {"default": {"pattern": "a_shape", "local": MUCH}, "heads": {"5": {"pattern": "grid", "lines": MUCH}}},
    },
    "min_tokens": 1,
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def listed_once(plan: Plan) -> Plan:
    """A plan to look into head by head: its tile lists, seconds of Triton's interpreter, are the same each time."""

    def remembered(group: HeadGroup) -> HeadGroup:
        lists = cache(lambda first, last: group.tile_lists(group, first, last))
        return replace(group, tile_lists=lambda _, first, last: lists(first, last))

    return replace(plan, groups=tuple(remembered(group) for group in plan.groups))
