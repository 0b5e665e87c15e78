"""On a GPU this version refuses by name: no kernels there yet, and no dense run in their place."""

from __future__ import annotations

import pytest
from assets import Assets

from mm_sglang.check import checks
from mm_sglang.demo.server import Server
from mm_sglang.serve import sglang_script

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]


def test_mm_sparse_refuses_to_start_and_says_why(assets: Assets) -> None:
    command = [sglang_script(), "serve", str(assets.models["qwen2_5_vl"]), "--attention-backend", "mm_sparse"]
    log = assets.folder / "gpu-refused.log"
    with pytest.raises(RuntimeError, match="the server ended with code"), Server(command, {}, log):
        pass
    assert "mm_sparse on device 'cuda': this version has no kernels for it" in log.read_text()
    assert next(fine for what, fine, _ in checks() if what == "device") is False
