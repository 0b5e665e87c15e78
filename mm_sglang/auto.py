"""`auto` heads in a server: what each chose, for as long as its request is prefilled.

A choice costs time once a layer: at a request's first sparse chunk, and again when its keys have grown fourfold. It
plans nine candidates up to three times, mostly once past a request's first layer, attends 8 tiles of queries for
each, and waits for the device up to four times; at any other chunk the choice is scaled to the chunk's size and nothing
waits.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mm_sglang.kernels.choosing import choose, for_chunk
from mm_sglang.kernels.engines import Engine
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.patterns import Auto, Boundary, HeadPattern, head_pattern
from mm_sglang.metrics import Metrics
from mm_sglang.search.candidates import FAMILIES

log = logging.getLogger(__name__)
# One of each kind that the search tells apart; the boundaries only round the pattern that profits most.
CANDIDATES = tuple(
    head_pattern(FAMILIES[name])
    for name in (
        "a_shape", "vertical_slash", "columns", "grid frame", "grid row", "block_topk", "columns and blocks",
        "q vertical_slash", "2d vertical_slash",
    )
)  # fmt: skip
GROWTH = 4  # keys over those of the last choice at which heads choose again
REQUESTS = 256  # whose choices are kept: nobody tells a backend that a request is over, so the longest unused goes


@dataclass(kw_only=True)
class _Held:
    """One layer of a request: what was chosen by auto recipe, for which chunk (prefix, keys), and the last chunk's."""

    chosen: dict[Auto, tuple[HeadPattern, ...]]
    at: tuple[int, int]
    end: int


@dataclass
class _Request:
    """layers: by number. learnt: of `choose`, by one request alone, so that equal prompts choose alike."""

    layers: dict[int, _Held] = field(default_factory=dict)
    learnt: dict[HeadPattern, float] = field(default_factory=dict)


@dataclass
class AutoHeads:
    """Turns `auto` among a layer's recipes into what its heads chose; each tensor-parallel rank decides for its own.

    tail: of the settings, as for `sparse_prefill`.
    agree: makes one of what context-parallel ranks, which have the same heads, found; atomics may round differently.
    """

    engine: Engine
    metrics: Metrics
    tail: int = 0
    agree: Callable[[Any], Any] = lambda found: found
    held: OrderedDict[str, _Request] = field(default_factory=OrderedDict)
    said: set[int] = field(default_factory=set)

    def recipes(
        self, rid: str, layer: int, patterns: Sequence[HeadPattern], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        *, slots: torch.Tensor | None, layout: TokenLayout, scale: float, out: torch.Tensor | None = None,
    ) -> Sequence[HeadPattern]:  # fmt: skip
        """`patterns` with every `auto` replaced; the other arguments as for `choose`."""
        autos = tuple(dict.fromkeys(p for p in patterns if isinstance(p, Auto)))
        if not autos:
            return patterns
        keys, prefix = layout.length, layout.length - len(q)
        request = self.held.setdefault(rid, _Request())
        self.held.move_to_end(rid)
        if len(self.held) > REQUESTS:
            self.held.popitem(last=False)
        held = request.layers.get(layer)
        # A chunk that does not go on where the last one ended is of another prompt under an old name, or starts again.
        if held is None or held.end != prefix or keys >= GROWTH * held.at[1] or set(autos) != set(held.chosen):
            found = {
                auto: choose(
                    q, k, v, layout=layout, candidates=CANDIDATES, density=auto.share(prefix, keys), scale=scale,
                    engine=self.engine, slots=slots, out=out, tail=self.tail, learnt=request.learnt,
                ).recipes
                for auto in autos
            }  # fmt: skip
            found = self.agree(found)
            held = request.layers[layer] = _Held(chosen=found, at=(prefix, keys), end=keys)
            self._tell(layer, [found[p][head] for head, p in enumerate(patterns) if isinstance(p, Auto)])
        held.end = keys
        now = (prefix, keys)
        today = {
            (auto, recipe): replace(
                for_chunk(recipe, held.at, now).scaled(auto.share(*now) / auto.share(*held.at)), residual=auto.residual
            )
            for auto in autos for recipe in set(held.chosen[auto])
        }  # fmt: skip
        return tuple(today[p, held.chosen[p][head]] if isinstance(p, Auto) else p for head, p in enumerate(patterns))

    def _tell(self, layer: int, chosen: Sequence[HeadPattern]) -> None:
        names = Counter(f"{p.boundary} boundary" if isinstance(p, Boundary) else p.kind for p in chosen)
        for name, heads in names.items():
            self.metrics.chosen(name, heads)
        if layer not in self.said:
            self.said.add(layer)
            said = ", ".join(f"{heads} {name}" for name, heads in names.most_common())
            log.info("mm_sparse: auto: layer %d chose, said once: %s", layer, said)
