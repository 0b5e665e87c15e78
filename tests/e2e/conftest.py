"""The models and media of every e2e test, made once a session."""

from __future__ import annotations

import pytest
from assets import Assets, make_assets


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    return make_assets(tmp_path_factory.mktemp("assets"))
