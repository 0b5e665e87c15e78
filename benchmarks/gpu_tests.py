"""The tests that need GPUs, group beside group: python -m benchmarks.gpu_tests [--minutes 8] [--only servers ranks]

First sees with `mm-sglang check` whether a server can start here at all. What a group has decided counts even if its
time ends. Adds a run a group to benchmarks/results/<gpu>/tests.json, with the names of what failed; pytest's output is
kept under --logs. Exit code 1 if a test failed or a group did not end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Parser, results_of
from benchmarks.kernels.report import machine
from benchmarks.ttft.__main__ import gpus
from mm_sglang.check import print_check

# By name: what pytest is told, and whether the group is for all GPUs together
GROUPS: dict[str, tuple[tuple[str, ...], bool]] = {
    "servers": (("tests/e2e/test_gpu.py",), True),
    "ranks": (("tests/context_parallel/test_processes.py", "-k", "nccl"), True),
    "one server": (("tests/e2e/test_metrics.py", "tests/e2e/test_abort.py", "tests/e2e/test_bad_input.py"), False),
    "kernels": (("tests/kernels", "tests/test_watch.py"), False),
}
GRACE = 20.0  # seconds for a group to end its servers once its time is over
VERDICT = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def start(name: str, log: Path, gpu: str | None) -> subprocess.Popen[str]:
    """pytest of a group, on one GPU or (None) all, writing to `log` as it goes."""
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", *GROUPS[name][0]]
    environment = dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, env=environment)


def verdicts(log: str) -> dict[str, list[str]]:
    """Tests by outcome, as far as pytest -v has come; the last word on a test counts."""
    found: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    for name, outcome in dict(VERDICT.findall(log)).items():
        found[outcome].append(name)
    return found


def run(names: list[str], visible: list[str], logs: Path, seconds: float) -> list[dict[str, Any]]:
    """All groups at once; a record each, also of one whose time ended."""
    began, running = time.monotonic(), {}
    for number, name in enumerate(names):
        log = logs / f"{name.replace(' ', '-')}.log"
        together = GROUPS[name][1]
        running[name] = start(name, log, None if together else visible[number % len(visible)]), log
    records = []
    for name, (process, log) in running.items():
        try:
            code: int | None = process.wait(timeout=max(0.1, seconds - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGINT)  # so that its servers are ended, too
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        found = verdicts(log.read_text(errors="replace"))
        bad = found["FAILED"] + found["ERROR"]
        records.append({
            "group": name, "command": "pytest " + " ".join(GROUPS[name][0]), "ended": code is not None,
            "seconds": round(time.monotonic() - began), "passed": len(found["PASSED"]), "failed": len(bad),
            "skipped": len(found["SKIPPED"]), "failures": bad,
        })  # fmt: skip
    return records


def main() -> int:
    parser = Parser("benchmarks.gpu_tests", __doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all groups; default: 8")
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=list(GROUPS), metavar="GROUP")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<gpu>/tests.json")
    parser.add_argument("--logs", type=Path, help="folder for pytest's output; default: a new one")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: these tests need one (the others: make test)")
    if print_check() != 0:
        parser.error("no server can start here, see above")
    about, visible = machine(), gpus()
    logs = options.logs or Path(tempfile.mkdtemp())
    logs.mkdir(parents=True, exist_ok=True)
    out = options.out or results_of(about) / "tests.json"
    held = json.loads(out.read_text()) if out.exists() else {"runs": []}
    records = run(options.only, visible, logs, options.minutes * 60)
    whose = {"date": about["date"], "commit": about["commit"], "machine": f"{len(visible)} x {about['gpu']}"}
    held["runs"] += [whose | {"versions": about["versions"]} | record for record in records]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(held, indent=1) + "\n")
    for r in records:
        end = "" if r["ended"] else ", did not end in its time"
        print(f"{r['group']:12} {r['passed']} passed, {r['failed']} failed, {r['skipped']} skipped{end} ({logs})")
        print("".join(f"    {name}\n" for name in r["failures"]), end="")
    return 1 if any(r["failed"] or not r["ended"] for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
