"""SGLang's vision towers run in slices of whole frames: the bits of one call, deepstack features with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mm_sglang.cpu.activate import NAME
from mm_sglang.demo.tiny_model import ARCHITECTURES, make_tiny_model

# With fewer rows a CPU may take another matrix product, each model of processor at numbers of its own: MKL and oneDNN
# are asked for one whose bits don't depend on it.
SAME_PRODUCTS = {"MKL_CBWR": "AVX2,STRICT", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slices_give_the_bits_of_the_whole(architecture: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture=architecture)
    script = Path(__file__).parent / "helpers" / "vision_towers.py"
    ran = subprocess.run(
        [sys.executable, str(script), architecture, str(model)],
        env=os.environ | {"SGLANG_PLATFORM": NAME} | SAME_PRODUCTS,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.endswith("equal\n"), ran.stderr[-3000:]
