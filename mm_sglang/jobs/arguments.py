"""The options of `mm-sglang job run`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_sglang.jobs.gang import CONTEXT, SPLITS


def add_job_run(commands: Any) -> None:
    """Add it to a parser's sub-commands."""
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="one question about every video, answers as JSON lines; run it again to go on where it stopped",
        description="Starts replicas of SGLang with mm_sparse on a Ray cluster and asks them. Every further option "
        "goes to SGLang as it is. Works under `ray job submit -- mm-sglang job run ...` too, with an absolute --out.",
    )
    run.add_argument("videos", type=Path, nargs="*", metavar="VIDEO", help="files, under the same path on every node")
    run.add_argument("--question", required=True, help="asked about each of them")
    run.add_argument("--model", required=True, help="folder or Hugging Face name")
    run.add_argument("--out", type=Path, default=Path("results.jsonl"), help="one line a video (default: %(default)s)")
    run.add_argument("--schema", type=Path, metavar="FILE.json", help="JSON schema that every answer has to fit")
    run.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of a replica (default: %(default)s)")
    run.add_argument(
        "--split", choices=SPLITS, default=CONTEXT,
        help="what those share out: a prefill's tokens, with all weights on each, or the weights of a model too large "
        "for one (default: %(default)s)",
    )  # fmt: skip
    run.add_argument("--replicas", type=int, default=1, metavar="K", help="how many of them (default: %(default)s)")
    run.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster (default: RAY_ADDRESS, else this machine alone)"
    )
    run.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of an answer (default: %(default)s)")
    run.add_argument("--max-video-tokens", type=int, metavar="N", help="make room for videos of N tokens")
    run.add_argument("--sparse-config", metavar="FILE", help="YAML file of head patterns")


def job_run(options: argparse.Namespace, extra: Sequence[str]) -> int:
    from mm_sglang.jobs.run import JobOptions, run_job

    return run_job(
        JobOptions(
            videos=tuple(options.videos), question=options.question, model=options.model, out=options.out,
            schema=options.schema, gpus=options.gpus, split=options.split, replicas=options.replicas,
            address=options.address, config=options.sparse_config, extra=tuple(extra), max_tokens=options.max_tokens,
            max_video_tokens=options.max_video_tokens,
        )
    )  # fmt: skip
