"""What is measured: inputs, and the recipe of each head for them. Budgets are in tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.planted import FRAME_TOKENS, KINDS
from mm_sglang.kernels.patterns import HeadPattern, head_pattern
from mm_sglang.kernels.plan import TILE

Recipe = dict[str, Any]
K = 1024
SHAPES = {"qwen2.5-vl-7b": (28, 4), "qwen3-vl-8b": (32, 8)}  # query and KV heads; head_dim 128
LENGTHS = (32 * K, 128 * K, 512 * K, 1024 * K)
SHORT_LENGTHS = (4 * K, 6 * K, 8 * K, 12 * K, 16 * K, 24 * K, 32 * K)  # where does sparse begin to pay?
RATE_LENGTHS = (128 * K, 1024 * K)

# The paper's budgets (MMInference: 1000 columns and 4096 slashes; one line a frame).
PAPER_SLASH: Recipe = {"pattern": "vertical_slash", "columns": 1000, "slashes": 4096}
PAPER_GRID: Recipe = {"pattern": "grid", "stride": "frame", "lines": 1, "horizontal": False, "text": False}


def fitted(kind: str, tokens: int) -> Recipe:
    """The recipe that fits a planted kind, with budgets about as large as what is planted."""
    anchors = max(tokens // 256, 128)
    near = {"pattern": "a_shape", "sink": 128, "local": 128}
    recipes: dict[str, Recipe] = {
        "blocks": {"pattern": "block_topk", "blocks": 4, "sink": 128, "local": 128},
        "columns": {"pattern": "vertical_slash", "columns": 128, "slashes": 128, "coverage": 0.98},
        "slashes": {"pattern": "vertical_slash", "columns": 128, "slashes": 512, "coverage": 0.98},
        "grid": {
            "pattern": "grid", "stride": "frame", "lines": 1, "horizontal": False, "text": False,
            "sink": 128, "local": 128,
        },
        "boundary": {
            "boundary": "2d",
            "parts": {
                "text->text": {"pattern": "vertical_slash", "columns": anchors // 4, "slashes": 128},
                "text->vision": near,
                "vision->text": near,
                "vision->vision": {"pattern": "vertical_slash", "columns": anchors, "slashes": 128},
            },
        },
    }  # fmt: skip
    return recipes[kind]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table for each shape and length.

    Args:
        name: as in the table.
        inputs: kind of planted inputs.
        recipe: (number of the KV head, tokens) -> its heads' recipe.
        lengths: where it is run, None: at every length asked for.
        note: what it is for.
    """

    name: str
    inputs: str
    recipe: Callable[[int, int], Recipe]
    lengths: tuple[int, ...] | None = None
    note: str = ""

    def patterns(self, tokens: int, q_heads: int, kv_heads: int) -> list[HeadPattern]:
        """One recipe a query head."""
        each = [head_pattern(self.recipe(j, tokens)) for j in range(kv_heads)]
        return [each[h // (q_heads // kv_heads)] for h in range(q_heads)]


def _kind(kind: str) -> Case:
    return Case(name=kind, inputs=kind, recipe=lambda j, n: fitted(kind, n), note="planted, recipe that fits")


MIX = Case(
    name="mix", inputs="mix", recipe=lambda j, n: fitted(KINDS[j % len(KINDS)], n),
    note="planted, KV head j has kind j % 5",
)  # fmt: skip
# 5 % of the tiles that a query tile sees on average
RATE_BLOCKS = Case(
    name="rate block_topk", inputs="blocks", lengths=RATE_LENGTHS, note="5 % of causal tiles",
    recipe=lambda j, n: {"pattern": "block_topk", "blocks": max(round(0.05 * n / TILE / 2), 1)},
)  # fmt: skip
RATE_GRID = Case(
    name="rate grid", inputs="grid", lengths=RATE_LENGTHS, note="4 lines a frame, vertical and horizontal",
    recipe=lambda j, n: {"pattern": "grid", "stride": "frame", "lines": 4},
)  # fmt: skip
RATE_BOUNDARY = Case(
    name="rate boundary", inputs="boundary", lengths=RATE_LENGTHS, note="2d: the paper's vertical_slash inside vision",
    recipe=lambda j, n: {
        "boundary": "2d",
        "parts": {
            "text->text": {"pattern": "vertical_slash", "columns": 1000, "slashes": 1024},
            "text->vision": {"pattern": "vertical_slash", "columns": 1000, "slashes": 1024},
            "vision->text": {"pattern": "a_shape", "sink": 128, "local": 1024},
            "vision->vision": PAPER_SLASH,
        },
    },
)  # fmt: skip
PAPER = Case(
    name="paper layer", inputs="mix", recipe=lambda j, n: PAPER_GRID if j % 2 else PAPER_SLASH,
    note="paper's budgets: KV heads alternate vertical_slash and grid",
)  # fmt: skip
PAPER_SLASH_ONLY = Case(
    name="paper vertical_slash", inputs="columns", recipe=lambda j, n: PAPER_SLASH,
    note="1000 columns, 4096 slashes",
)  # fmt: skip
PAPER_GRID_ONLY = Case(
    name="paper grid", inputs="grid", recipe=lambda j, n: PAPER_GRID, lengths=RATE_LENGTHS, note="one line a frame"
)
RANDOM = Case(
    name="random", inputs="random", recipe=lambda j, n: PAPER_SLASH,
    note="nothing is planted: recall says what any sparse pattern loses there",
)  # fmt: skip
# In the order of what they tell, in case time runs out.
CASES = (
    MIX, PAPER, RATE_BLOCKS, PAPER_SLASH_ONLY, RATE_GRID, RATE_BOUNDARY, PAPER_GRID_ONLY,
    *(_kind(kind) for kind in KINDS), RANDOM,
)  # fmt: skip
assert FRAME_TOKENS == 196, "the recipes and layouts are for frames of 14 x 14"
