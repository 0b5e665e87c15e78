"""The models and media of every e2e test, made once a session."""

from __future__ import annotations

import pytest
import torch
from assets import Assets, make_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    head_dim = 64 if torch.cuda.is_available() else 32  # the GPU's kernels have no smaller one
    return make_assets(tmp_path_factory.mktemp("assets"), head_dim=head_dim)
