"""benchmarks.gpu_tests without a GPU: what is kept of groups that pass, fail, or do not end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu_tests


def test_groups_run_side_by_side_and_keep_what_they_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = tmp_path / "test_quick.py", tmp_path / "test_slow.py"
    quick.write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('n', ['a b', 'c'])\n"
        "def test_one(n): assert os.environ['CUDA_VISIBLE_DEVICES'] == '5'\n"
        "def test_two(): assert False\ndef test_three(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise OSError\ndef test_four(broken): pass\n"
    )
    slow.write_text("import time\ndef test_done(): pass\ndef test_hangs(): time.sleep(300)\n")
    monkeypatch.setattr(gpu_tests, "GROUPS", {"slow": ((str(slow),), True), "quick": ((str(quick),), False)})
    hanging, ended = gpu_tests.run(["slow", "quick"], ["4", "5"], tmp_path, 30.0)
    assert ended["ended"] and (ended["passed"], ended["failed"], ended["skipped"]) == (2, 2, 1)
    assert [name.partition("::")[2] for name in ended["failures"]] == ["test_two", "test_four"]
    assert not hanging["ended"] and (hanging["passed"], hanging["failed"]) == (1, 0)
    assert hanging["seconds"] < 200


def test_the_groups_exist() -> None:
    root = Path(gpu_tests.__file__).parents[1]
    for arguments, _ in gpu_tests.GROUPS.values():
        for path in (a for a in arguments if a.startswith("tests/")):
            assert (root / path).exists()
