"""The searched settings of a run: made once in a folder that several processes may share, on prompts fixed beforehand.

A prompt of each kind of question, of another split: what its heads do differs more from one kind of question to
another than from prompt to prompt, and three kinds gave blocks to heads that lose two others' answers by them. All
kinds whatever --tasks says, or each process of a run would search patterns for its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.accuracy.methods import FILES, WITHOUT
from benchmarks.tiny_model.tasks import TASKS
from mm_sglang.config import SparseConfig
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.model_hash import require_same_model
from mm_sglang.search.candidates import FAMILIES
from mm_sglang.search.capture import Captured
from mm_sglang.search.run import search_prompts

AT = (1 << 15, 1 << 17)  # tokens; a length is served by the search nearest to it
SEED = 1 << 20  # of the training split; budgets are found with seeds behind it
# task, tokens, seed -> inputs of Captured.run and their layout
Question = Callable[[str, int, int], tuple[Mapping[str, torch.Tensor], TokenLayout]]
Configs = dict[tuple[str, int], SparseConfig]  # by method and length of the search


def serving(length: int, searched: Collection[int]) -> int:
    """Of these lengths the nearest in ratio."""
    return min(sorted(searched), key=lambda n: max(n, length) / min(n, length))


def searched_at(lengths: Sequence[int]) -> list[int]:
    """Lengths of the searches for these prompts: of AT; if all prompts are shorter, theirs."""
    within = [n for n in AT if n <= max(lengths)] or [max(lengths)]
    return sorted({serving(length, within) for length in lengths})


@contextmanager
def alone(folder: Path, in_time: Callable[[], None]) -> Iterator[None]:
    """Only one process at a time searches in a folder; the others wait, as long as `in_time` does not raise."""
    handle = os.open(folder, os.O_RDONLY)  # the folder itself: no file is left behind, and the lock ends with a process
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                in_time()
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True, kw_only=True)
class Searching:
    """Where settings are and how they are made; in_time raises when the time is over."""

    held: Captured
    folder: Path
    density: float
    question: Question
    in_time: Callable[[], None]

    def settings(self, lengths: Sequence[int], names: Collection[str], out: Path) -> Configs:
        """Of the methods `names`, at the lengths that serve `lengths`; the files are copied beside the results.

        Raises:
            ValueError: a file in the folder is of another model or density.
        """
        found: Configs = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        with alone(self.folder, self.in_time):
            for length in searched_at(lengths):
                paths = {name: self.folder / f"{name}-{length}.yaml" for name in FILES}
                if not all(paths[name].exists() for name in names):
                    self._search(length, paths)
                for name in names:
                    found[name, length] = self._read(paths[name])
                    if out.resolve() != self.folder.resolve():
                        shutil.copyfile(paths[name], out / paths[name].name)
        return found

    def _search(self, length: int, paths: Mapping[str, Path]) -> None:
        fewer = {paths[name]: [f for f in FAMILIES if not f.startswith(prefixes)] for name, prefixes in WITHOUT.items()}
        prompts = {f"{task} {length} {SEED}": partial(self.question, task, length, SEED) for task in TASKS}
        search_prompts(
            self.held, prompts, paths["searched"], target=self.density, fewer=fewer, maps=False, each_layer=self.in_time
        )

    def _read(self, path: Path) -> SparseConfig:
        config = SparseConfig.from_yaml(path)
        require_same_model(config, self.held.folder)
        if config.provenance.get("density") != self.density:
            raise ValueError(f"{path} was searched for another density: delete it, or take another --searched")
        return config
