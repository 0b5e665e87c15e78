"""The models and media of every e2e test, made once a session."""

from __future__ import annotations

import pytest
import torch
from assets import Assets, make_assets
from hf_reference import HuggingFace
from recipes import TOKENS


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    head_dim = 64 if torch.cuda.is_available() else 32  # the GPU's kernels have no smaller one
    return make_assets(tmp_path_factory.mktemp("assets"), head_dim=head_dim)


@pytest.fixture(scope="session")
def wanted(assets: Assets) -> dict[str, dict[str, list[int]]]:
    """transformers' greedy tokens of every prompt, by architecture."""
    out = {}
    for name, folder in assets.models.items():
        model = HuggingFace(folder)
        out[name] = {prompt: model.greedy(parts, TOKENS) for prompt, parts in assets.prompts.items()}
    return out
