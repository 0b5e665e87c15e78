"""A prefill shared by processes over gloo, or over NCCL by GPUs, has the bits of one process: chunks with a prefix,
videos and text in turn, heads of one KV head with different recipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HELPER = Path(__file__).parents[1] / "helpers" / "shared_prefill.py"


def run(size: int, folder: Path, *flags: str) -> list[dict[str, object]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(HELPER), str(rank), str(size), str(folder), *flags], env=environment)
        for rank in range(size)
    ]
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * size
    return [torch.load(folder / f"{rank}-{size}.pt") for rank in range(size)]


def same_on_all(sizes: tuple[int, ...], folder: Path, *flags: str) -> None:
    (alone,) = run(1, folder, *flags)
    out = alone["out"]
    assert isinstance(out, torch.Tensor) and out.isfinite().all()
    for size in sizes:
        for rank in run(size, folder, *flags):
            assert rank["tiles"] == alone["tiles"], size
            assert torch.equal(rank["out"], out), size  # type: ignore[arg-type]


def test_processes_over_gloo(tmp_path: Path) -> None:
    same_on_all((2, 4), tmp_path)


@pytest.mark.gpu
def test_gpus_over_nccl(tmp_path: Path) -> None:
    sizes = tuple(n for n in (2, 4, 8) if n <= torch.cuda.device_count())
    if not sizes:
        pytest.skip("needs two CUDA devices")
    same_on_all(sizes, tmp_path, "--gpu")
