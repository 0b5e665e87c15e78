"""`mm-sglang job run`: everything checked first, then the cluster, then the job's loop (job.py)."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_sglang.jobs.gang import CONTEXT, gang_command
from mm_sglang.jobs.inputs import read_inputs, require_files
from mm_sglang.jobs.results import Results
from mm_sglang.jobs.schema import Schema, read_schema

if TYPE_CHECKING:
    from mm_sglang.jobs.service import ServiceOptions

LOCAL = "local"  # a Ray of this machine's own: the ranks run here


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Args:
    videos: files that every node sees under the same path.
    schema: file with a JSON schema for the answers.
    gpus: ranks of a replica; split: what they share out, see jobs/gang.py; replicas: how many of them.
    address: of the Ray cluster; without it RAY_ADDRESS, else a Ray of this machine's own.
    config, extra, max_video_tokens: as for `mm-sglang serve`.
    max_tokens: of an answer.
    """

    videos: tuple[Path, ...]
    question: str
    model: str
    out: Path
    schema: Path | None = None
    gpus: int = 1
    split: str = CONTEXT
    replicas: int = 1
    address: str | None = None
    config: str | None = None
    extra: tuple[str, ...] = field(default=())
    max_tokens: int = 256
    max_video_tokens: int | None = None


def run_job(options: JobOptions) -> int:
    """Answer what is not answered yet; 0 if everything is at the end, 1 if a line says why not.

    Raises:
        ValueError: anything that can be known to be wrong beforehand; nothing is left running.
        RuntimeError: no replica runs any more.
    """
    require_files(options.videos)
    _require_kept(options.out)
    model, config = whole_paths(options.model, options.config)
    options = replace(options, model=model, config=config)
    for name in ("gpus", "replicas", "max_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: needs at least 1")
    schema = None if options.schema is None else read_schema(options.schema)
    require_settings(options, cores=options.gpus if _address(options) == LOCAL else None)
    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        results = stack.enter_context(Results(options.out))
        _join_cluster(options, stack)
        inputs = read_inputs(options.videos, _asked(options, schema))
        results.retry({each.key for each in inputs})
        open_inputs = [each for each in inputs if each.key not in results.done]
        print(f"{len(inputs)} inputs, {len(inputs) - len(open_inputs)} of them done before", file=sys.stderr)
        if not open_inputs:
            return 0

        from mm_sglang.jobs.job import Job

        return Job(options, schema, open_inputs, results, name=secrets.token_hex(4)).run(stack)


def whole_paths(model: str, config: str | None) -> tuple[str, str | None]:
    """Replicas run in folders of their own, on other hosts too."""
    model = str(Path(model).absolute()) if Path(model).is_dir() else model
    return model, None if config is None else str(Path(config).absolute())


def _require_kept(out: Path) -> None:
    """A job submitted with a working directory runs in Ray's copy of it, which goes when the job ends."""
    if {"runtime_resources", "working_dir_files"} <= set(out.absolute().parts):
        raise ValueError(f"--out {out}: Ray deletes the job's working directory, needs an absolute path outside of it")


def _asked(options: JobOptions, schema: Schema | None) -> Any:
    """What an answer depends on besides the video; how many GPUs compute it is no part of that."""
    from mm_sglang.model_hash import model_hash

    config = None if options.config is None else Path(options.config).read_text(encoding="utf-8")
    settings = [config, list(options.extra), options.max_tokens, options.max_video_tokens]
    return {"question": options.question, "schema": schema, "model": model_hash(options.model), "settings": settings}


def require_settings(options: JobOptions | ServiceOptions, *, cores: int | None = None) -> None:
    """What a replica's leader does when it starts, done here to hear of mistakes now; `cores` as for gang_command."""
    from mm_sglang.compat import require_supported_sglang

    require_supported_sglang()
    gang_command(
        model=options.model, config=options.config, extra=options.extra, gpus=options.gpus, split=options.split,
        max_video_tokens=options.max_video_tokens, cores=cores,
    )  # fmt: skip


def _address(options: JobOptions) -> str:
    return options.address or os.environ.get("RAY_ADDRESS") or LOCAL


def _join_cluster(options: JobOptions, stack: ExitStack) -> None:
    try:
        import ray
    except ImportError as error:
        raise ValueError("jobs need Ray: `pip install ray==2.55.1`") from error
    import torch

    from mm_sglang.parallel.placement import cluster_gpus, connect, require_gpus

    address = _address(options)
    here = torch.cuda.device_count() or os.cpu_count() or 1  # a rank is a core where there is no GPU
    if address == LOCAL:
        require_gpus(options.replicas, options.gpus, here)
    stack.callback(ray.shutdown)
    connect(address, gpus=here)
    require_gpus(options.replicas, options.gpus, cluster_gpus())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a job as Ctrl-C does: with its replicas."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
