"""A run: the search, then for each length, task and depth all methods on the same samples, until the time is over."""

from __future__ import annotations

import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.accuracy.methods import (
    FILES,
    NO_TAIL,
    RIVALS,
    SEARCHED,
    Layer,
    Make,
    Recipes,
    balance,
    rival,
    searched,
    tail_of,
)
from benchmarks.accuracy.searching import SEED, Searching, serving
from benchmarks.accuracy.store import Store
from benchmarks.accuracy.student import Outcome, Prompt, Student
from benchmarks.tiny_model.inputs import Encoder
from benchmarks.tiny_model.tasks import make_sample
from mm_sglang.auto import CANDIDATES
from mm_sglang.config import SparseConfig
from mm_sglang.kernels.choosing import choose
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.model_hash import require_same_model
from mm_sglang.search.videos import content_of

BUDGET_PROMPTS = 3  # a task and length, on which a method's budgets are found


class OutOfTime(Exception):
    """The next cell would end after --budget-seconds."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """See __main__.py."""

    model: str
    config: Path | None
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    samples: int
    density: float
    out: Path
    searched: Path
    budget: float
    seed: int = 0


@dataclass(kw_only=True)
class Session:
    """Everything a run holds."""

    options: Options
    student: Student
    encoder: Encoder
    store: Store
    began: float
    configs: dict[tuple[str, int], SparseConfig] = field(default_factory=dict)
    spent: dict[int, float] = field(default_factory=dict)  # seconds that the last cell of a length took

    def run(self) -> None:
        """All cells that are not in the store yet, which is saved after each; what is left out is said there."""
        work = list(self._missing())
        self.store.left_out = []
        try:
            needed = {method for *_, methods in work for method in methods} & set(SEARCHED)
            if needed:
                self._search(needed)
            for number, (length, task, depth, methods) in enumerate(tqdm(work, desc="accuracy", unit="cell")):
                start = time.monotonic()
                try:
                    self._in_time(self.spent.get(length, 0.0))
                    self._cell(length, task, depth, methods)
                except OutOfTime:
                    work = work[number:]
                    raise
                self.spent[length] = time.monotonic() - start
                self.store.save()
        except OutOfTime:
            self.store.left_out = [f"{task} {length} {depth:g}" for length, task, depth, _ in work]
        self.store.save()

    def _missing(self) -> Iterator[tuple[int, str, float, tuple[str, ...]]]:
        options = self.options
        for length in sorted(options.lengths, reverse=True):  # what matters most, if the time is short
            for depth in options.depths:
                for task in options.tasks:
                    find = partial(self.store.find, task, length, depth)
                    methods = tuple(method for method in options.methods if find(method) is None)
                    if methods:
                        yield length, task, depth, methods

    def _in_time(self, needed: float) -> None:
        if time.monotonic() - self.began + needed > self.options.budget:
            raise OutOfTime

    def _prompt(self, task: str, length: int, split: str, seed: int, depth: float | None = None) -> Prompt:
        sample = make_sample(task, tokens=length, seed=seed, split=split, depth=depth, device=self.student.device)
        return self.student.prepare(self.encoder(sample, answers=True))

    def _search(self, methods: Collection[str]) -> None:
        """Settings by method and length of their search: --config's for all, or made here and kept in the folder."""
        options = self.options
        if options.config is not None:
            config = SparseConfig.from_yaml(options.config)
            require_same_model(config, options.model)
            self.configs = {("searched", max(options.lengths)): config}
            return
        names = [name for name in FILES if name in methods or (name == "searched" and NO_TAIL in methods)]
        searching = Searching(
            held=self.student.held, folder=options.searched, density=min(options.density, 0.99),
            question=self._question, in_time=partial(self._in_time, 0.0),
        )  # fmt: skip
        self.configs = searching.settings(options.lengths, names, options.out)
        files = [f"{name}-{length}.yaml" for name, length in self.configs]
        self.store.searches({name: content_of(options.out / name) for name in files})

    def _question(self, task: str, length: int, seed: int) -> tuple[Mapping[str, torch.Tensor], TokenLayout]:
        return self._prompt(task, length, "train", seed).question()

    def _make(self, method: str, length: int) -> Make:
        heads = self.student.held.heads
        if method in RIVALS:
            return rival(method, heads)
        of = "searched" if method == NO_TAIL else method
        return searched(self.configs[of, serving(length, [n for name, n in self.configs if name == of])], heads)

    def _factors(self, length: int, task: str, methods: Sequence[str]) -> dict[str, list[float]]:
        """A factor a layer for each method, found once a task and length on prompts of the training split."""
        names = {m: f"{m} {task} {length}" for m in methods if m in RIVALS or m in SEARCHED}
        need = {m: self._make(m, length) for m, name in names.items() if name not in self.store.factors}
        found: dict[str, list[float]] = {m: [] for m in need}
        if need:
            held = self._layers(task, length)
            for layers in held:
                self._in_time(0.0)
                for method, make in need.items():
                    own = [replace(layer, tail=tail_of(method)) for layer in layers]
                    found[method].append(balance(make, own, self.options.density))
                layers.clear()
        self.store.factors |= {names[method]: factors for method, factors in found.items()}
        return {method: self.store.factors[name] for method, name in names.items()}

    def _layers(self, task: str, length: int) -> list[list[Layer]]:
        """Each layer in BUDGET_PROMPTS prompts; one alone may cost half or twice what others do."""
        held: list[list[Layer]] = [[] for _ in range(self.student.held.layers)]
        ops = self.student.engine.ops()
        for seed in range(BUDGET_PROMPTS):
            self._in_time(0.0)
            inputs, layout = self._question(task, length, SEED + 1 + seed)

            def look(
                number: int, q: torch.Tensor, k: torch.Tensor, _: torch.Tensor, scale: float,
                layout: TokenLayout = layout,
            ) -> None:  # fmt: skip
                kept = Layer(number=number, q=q.contiguous(), k=k.contiguous(), layout=layout, scale=scale, ops=ops)
                held[number].append(kept)

            self.student.held.run(inputs, look)
        return held

    def _cell(self, length: int, task: str, depth: float, methods: Sequence[str]) -> None:
        """All samples of a cell under the methods that it lacks; dense always, as the others are compared with it."""
        factors = self._factors(length, task, methods)
        results: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for number in range(self.options.samples):
            self._in_time(0.0)
            seed = zlib.crc32(f"{self.options.seed} {task} {length} {depth:g} {number}".encode())
            prompt = self._prompt(task, length, "test", seed, depth)
            dense = self.student.run(prompt, None)
            for method in methods:
                outcome = dense if method == "dense" else self._outcome(method, length, prompt, factors.get(method))
                results[method].append(as_numbers(outcome, dense))
        for method, samples in results.items():
            self.store.add(task, length, depth, method, samples)

    def _outcome(self, method: str, length: int, prompt: Prompt, factors: list[float] | None) -> Outcome:
        if factors is None:
            return self.student.run(prompt, partial(self._auto, prompt), tail_of(method))
        make = self._make(method, length)

        def recipes(layer: int, *_: object) -> Recipes:
            return make(layer, factors[layer])

        return self.student.run(prompt, recipes, tail_of(method))

    def _auto(
        self, prompt: Prompt, _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> Recipes:  # fmt: skip
        return choose(
            q, k, v, layout=prompt.layout, candidates=CANDIDATES, density=self.options.density, scale=scale,
            engine=self.student.engine, tail=tail_of("auto"),
        ).recipes  # fmt: skip


def as_numbers(outcome: Outcome, dense: Outcome) -> dict[str, float]:
    """store.MEASURES of one sample."""
    same = sum(a == b for a, b in zip(outcome.tokens, dense.tokens, strict=True))
    return {
        "correct": float(outcome.correct), "agreement": same / len(dense.tokens), "recall": outcome.recall,
        "error": outcome.error, "density": outcome.density,
    }  # fmt: skip
