"""SGLang's vision towers run in slices of whole frames: the bits of one call, deepstack features with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm_sglang.cpu.activate import NAME
from mm_sglang.demo.tiny_model import ARCHITECTURES, make_tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_give_the_bits_of_the_whole(architecture: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture=architecture)
    script = Path(__file__).parent / "helpers" / "vision_towers.py"
    ran = subprocess.run(
        [sys.executable, str(script), architecture, str(model)], env=os.environ | {"SGLANG_PLATFORM": NAME},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.endswith("equal\n"), ran.stderr[-3000:]
