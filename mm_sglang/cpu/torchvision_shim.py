"""Lets PyPI's torchvision, which is linked against CUDA, be imported beside a CPU build of torch.

Why: torchvision's compiled operators cannot load without the CUDA libraries. It forgives that for all of them but two,
`nms` and `qnms`, whose fake (shape-only) kernels it registers unconditionally: `import torchvision` then dies with
"operator torchvision::nms does not exist", and SGLang and transformers' video processors with it. The CPU build of
torchvision is not on PyPI.

How: an import hook waits until torchvision gets to those registrations. Only if torch has no CUDA and torchvision could
not load its own operators does it declare the two, without a kernel: nothing here calls them.

It has to be in place before anybody imports torchvision, so `make setup` writes a one-line .pth file that calls
`install` into the virtual environment. The wheel does not carry that file: with a GPU there is no use for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.library import Library

REGISTERS_FAKES = "torchvision._meta_registrations"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_declared: list[Library] = []  # a Library takes its declarations back when it is collected


class _BeforeFakes:
    """A meta-path finder that finds nothing; it acts once, just before REGISTERS_FAKES is imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == REGISTERS_FAKES:
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_missing_operators() -> None:
    """Declares torchvision's `nms` and `qnms` if torch has no CUDA and torchvision did not load its own."""
    import torch
    from torchvision import extension

    if torch.version.cuda is None and not extension._has_ops():
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in SCHEMAS:
            library.define(schema)  # type: ignore[no-untyped-call]
        _declared.append(library)


def install() -> None:
    """Starts waiting for torchvision. Imports nothing, so it costs nothing where torchvision is never used."""
    if not any(isinstance(finder, _BeforeFakes) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeFakes())
