"""What the processes of one replica are told; it travels through Ray, so it holds no more than names and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CONTEXT, TENSOR = "context", "tensor"
SPLITS = (CONTEXT, TENSOR)
PIPELINE, MIXED = ("--pp-size", "--pipeline-parallel-size"), "--enable-mixed-chunk"


@dataclass(frozen=True, kw_only=True)
class Gang:
    """One start of one replica.

    Args:
        model, config, extra, max_video_tokens: as for `mm-sglang serve`.
        gpus: ranks, each with a GPU of its own.
        split: what they share out, "context": a prefill's tokens, or "tensor": the weights too large for one.
        decoders: Ray actors that decode videos; 0 leaves it to SGLang.
        hub, token: where messages go.
        name: unlike any other gang's, this replica's earlier ones included.
    """

    model: str
    config: str | None
    extra: tuple[str, ...]
    gpus: int
    split: str
    max_video_tokens: int | None
    decoders: int
    hub: str
    token: str
    name: str

    @property
    def host(self) -> str:
        """Where this job's messages go; the same kind of address serves the replica's own."""
        import ray

        return "127.0.0.1" if self.hub.startswith("tcp://127.") else str(ray.util.get_node_ip_address())

    def command(self) -> tuple[list[str], dict[str, str]]:
        return gang_command(
            model=self.model, config=self.config, extra=self.extra, gpus=self.gpus, split=self.split,
            max_video_tokens=self.max_video_tokens, cores=self.gpus,
        )  # fmt: skip


def gang_command(
    *, model: str, config: str | None, extra: Sequence[str], gpus: int, split: str, max_video_tokens: int | None,
    cores: int | None,
) -> tuple[list[str], dict[str, str]]:  # fmt: skip
    """`server_command` of a gang; arguments as for Gang and there.

    Raises:
        ValueError: of `server_command`, a `split` that is unknown, or options that say the same again.
    """
    from mm_sglang.serve import CONTEXT_PARALLEL, TENSOR_PARALLEL, flag_value, refuse_other_backends, server_command

    if split not in SPLITS:
        raise ValueError(f"split={split!r}: needs one of {', '.join(SPLITS)}")
    refuse_other_backends(extra)
    for flag in (*TENSOR_PARALLEL, *CONTEXT_PARALLEL):
        if flag_value(extra, flag) is not None:
            raise ValueError(f"{flag}: a job's ranks are counted by --gpus, and --split says what they share out")
    for flag in PIPELINE:
        if flag_value(extra, flag) is not None:
            raise ValueError(f"{flag}: a replica has no pipeline stages")
    if split == CONTEXT and gpus > 1 and flag_value(extra, MIXED) is not None:
        raise ValueError(f"{MIXED}: context parallelism needs none, a decode step has no rows to spread")
    tensor = ["--tp-size", str(gpus)] if split == TENSOR else []
    return server_command(
        model, config=config, extra=[*tensor, *extra], cores=cores, max_video_tokens=max_video_tokens,
        context_parallel=gpus if split == CONTEXT else None,
    )  # fmt: skip
