"""The methods: what each head attends, as a function of one factor on the budgets, by which all come to one density.

Searched patterns keep the family that the search gave each head; their budgets take the same road to the density as
the rivals', so that a search at one length may serve another at the cost that is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.accuracy.patterns import Fixed, Strided, TriShape
from mm_sglang.config import TEXT_TAIL, SparseConfig
from mm_sglang.kernels.inspection import density
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import Ops
from mm_sglang.kernels.patterns import AShape, BlockTopK, HeadPattern, VerticalSlash
from mm_sglang.kernels.prefill import make_plan
from mm_sglang.search.candidates import largest_factor

Recipes = tuple[HeadPattern, ...]
Make = Callable[[int, float], Recipes]  # layer, factor -> a recipe a head
STEPS, REACH = 9, 8.0  # of bisection: budgets to within 2%, between 1/256 and 256 times
ALL_BLOCKS = 1 << 20  # more key tiles than there are, where coverage alone decides
# Of all methods that choose blocks; FlashPrefill V2's own 256 and 512 are more than 10% of a short prompt's tiles.
SINK, WINDOW = 128, 256
WITHOUT = {"searched_no_boundary": ("k ", "q ", "2d "), "searched_no_grid": ("grid", "q grid")}  # family prefixes
FILES = ("searched", *WITHOUT)
NO_TAIL = "searched_no_tail"
SEARCHED = (*FILES, NO_TAIL)
WITH_TAIL = "xattention_tail"
BLOCKS = BlockTopK(blocks=32, sink=SINK, local=WINDOW)
ANTIDIAGONAL = BlockTopK(blocks=32, sink=SINK, local=WINDOW, score="antidiagonal")

RIVALS: Mapping[str, tuple[HeadPattern, str]] = {
    "a_shape": (AShape(sink=128, local=2048), "StreamingLLM: first and nearest keys"),
    "tri_shape": (TriShape(sink=128, local=2048), "A-shape, last 128 queries dense"),
    "strided": (Strided(), "Sparse Transformer, stride of a frame, every n-th diagonal"),
    "fixed": (Fixed(), "Sparse Transformer, blocks of a frame, every n-th block's last key or several"),
    "vertical_slash": (VerticalSlash(columns=1000, slashes=2048), "MInference: vertical-slash in every head"),
    "xattention": (ANTIDIAGONAL, "XAttention, stride 16"),
    WITH_TAIL: (ANTIDIAGONAL, "the same with mm_sparse's dense rows for the question, which XAttention has not"),
    "flexprefill": (
        BlockTopK(blocks=ALL_BLOCKS, coverage=0.5, sink=SINK, local=WINDOW),
        "FlexPrefill's query-aware heads: blocks up to a coverage",
    ),
    "mean_blocks": (BLOCKS, "blocks by mean keys"),
    "flashprefill": (BlockTopK(blocks=32, sink=SINK, local=WINDOW, residual=True), "FlashPrefill V2: the same, and "
                     "one mean key for each block left out"),
}  # fmt: skip
NOTES = {
    "dense": "full causal attention",
    "searched": "mm_sparse, each head's pattern by mm-sglang search",
    "searched_no_boundary": "the same without boundaries between text and vision",
    "searched_no_grid": "the same without grids",
    NO_TAIL: "the same, the question's queries as sparse as all others",
    "auto": "mm_sparse without a search",
    **{name: note for name, (_, note) in RIVALS.items()},
}
METHODS = tuple(NOTES)


def tail_of(method: str) -> int:
    """The text tail that mm_sparse has if settings name none; but for WITH_TAIL the rivals are run as published."""
    return TEXT_TAIL if method in (*FILES, "auto", WITH_TAIL) else 0


def rival(name: str, heads: int) -> Make:
    """All heads alike."""
    base = RIVALS[name][0]

    def make(layer: int, factor: float) -> Recipes:
        if isinstance(base, BlockTopK) and base.coverage is not None:
            share = max(1e-6, 1.0 - math.exp(-factor))
            # all of the mass is all blocks, those too whose estimate has rounded to none
            coverage = share if share < 1.0 else None
            own: HeadPattern = BlockTopK(blocks=base.blocks, coverage=coverage, sink=base.sink, local=base.local)
        else:
            own = base.scaled(factor)
        return (own,) * heads

    return make


def searched(config: SparseConfig, heads: int) -> Make:
    """Each head's own family; a layer that the settings leave dense is refused, as it can't be brought to a density."""

    def make(layer: int, factor: float) -> Recipes:
        own = config.patterns(layer, heads)
        if own is None:
            raise ValueError(f"layer {layer} is dense in these settings: needs a sparse recipe in every layer")
        return tuple(recipe.scaled(factor) for recipe in own)

    return make


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a method sees of a layer in one prompt: q [N, H, D], k [N, Hkv, D]."""

    number: int
    q: torch.Tensor
    k: torch.Tensor
    layout: TokenLayout
    scale: float
    ops: Ops
    tail: int = 0

    def density(self, recipes: Recipes) -> float:
        """Tiles that all heads compute over those of dense causal attention."""
        plan = make_plan(
            self.q, self.k, layout=self.layout, patterns=recipes, scale=self.scale, ops=self.ops, tail=self.tail
        )
        return density(plan)


def balance(make: Make, layers: Sequence[Layer], target: float) -> float:
    """The factor at which a method keeps to the target in a layer, on average over prompts."""

    def density_of(factor: float) -> float:
        return sum(layer.density(make(layer.number, factor)) for layer in layers) / len(layers)

    return largest_factor(density_of, target, STEPS, REACH)
