"""Tests marked `gpu` run where there is a CUDA device, else they are skipped; `make test` runs files side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Files that start Ray: one after another, because a gang that comes back has to within a minute.
RAY = (
    "tests/e2e/test_job_cluster.py",
    "tests/e2e/test_job_nodes.py",
    "tests/e2e/test_jobs.py",
    "tests/e2e/test_service.py",
    "tests/jobs/test_arguments.py",
)

# One thread in this process and those it starts, whoever runs beside it: more threads than cores wait for each other. A
# reference of 0.2 s takes 60 s with another pytest beside it, on two cores with two threads each as on 64 with 64.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Every server, rank and worker that a test starts imports 6000 modules: see tests/helpers/start/sitecustomize.py.
START = Path(__file__).parent / "helpers" / "start"
if str(START) not in os.environ.get("PYTHONPATH", ""):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(START), os.environ.get("PYTHONPATH")]))

# Ray makes its workers nice (15): beside other tests they would hardly run, and be all that is left at the end.
os.environ.setdefault("RAY_worker_niceness", "0")

# A call to Ray where nobody connected is a mistake, and an error then: the Ray that it would start ends this process
# when it ends.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: side_by_side(item.nodeid) != "Ray")  # first: they take longest, and wait a lot
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def side_by_side(nodeid: str) -> str:
    """Tests with the same answer run on one worker, in their order: a file's tests share its servers."""
    file = nodeid.split("::")[0]
    return "Ray" if file in RAY else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Called where pytest-xdist is installed and -n given."""
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # it would put the files with the fewest tests last: those with servers
    scheduler = LoadScopeScheduling(config, log)
    scheduler._split_scope = side_by_side
    return scheduler
