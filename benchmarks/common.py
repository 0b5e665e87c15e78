"""What the benchmarks' command lines share: one-line refusals and the place of their results."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

RESULTS = Path(__file__).resolve().parent / "results"


class Parser(argparse.ArgumentParser):
    """Of `python -m <module>`. What is wrong is one line, with exit code 2.

    Args:
        module: its dotted name.
        doc: its docstring; the first line describes it.
    """

    def __init__(self, module: str, doc: str | None) -> None:
        super().__init__(prog=f"python -m {module}", description=(doc or "").splitlines()[0])
        self.module = module

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.module}: {' '.join(message.split())}\n")


def results_of(about: Mapping[str, Any]) -> Path:
    """The folder of results measured on a machine, as `benchmarks.kernels.report.machine` tells of it."""
    gpu: str = about["gpu"]
    return RESULTS / gpu.lower().replace(" ", "-")
