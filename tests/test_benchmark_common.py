"""What the benchmarks' command lines have in common: where a GPU is needed and there is none, one line says so."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from benchmarks.common import RESULTS, results_of

ON_A_GPU = ("benchmarks.kernels.__main__", "benchmarks.kernels.residual", "benchmarks.ttft.__main__",
            "benchmarks.scaling.__main__")  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
@pytest.mark.parametrize("module", ON_A_GPU)
def test_no_gpu_is_one_line_and_exit_code_2(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module])
    with pytest.raises(SystemExit) as ended:
        import_module(module).main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "no CUDA device" in said and said.count("\n") == 1
    assert said.startswith(module.removesuffix(".__main__") + ": ")


def test_results_of_a_gpu_have_a_folder_of_their_own() -> None:
    assert results_of({"gpu": "NVIDIA H200"}) == RESULTS / "nvidia-h200"
    assert (RESULTS / "nvidia-h200" / "ttft.json").is_file()
