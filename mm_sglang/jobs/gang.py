"""What the processes of one replica are told; it travels through Ray, so it holds no more than names and numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gang:
    """One start of one replica.

    Args:
        model, config, extra: as for `mm-sglang serve`.
        gpus: ranks, each with a GPU of its own.
        decoders: Ray actors that decode videos; 0 leaves it to SGLang.
        hub, token: where messages go.
        name: unlike any other gang's, this replica's earlier ones included.
    """

    model: str
    config: str | None
    extra: tuple[str, ...]
    gpus: int
    decoders: int
    hub: str
    token: str
    name: str

    @property
    def host(self) -> str:
        """Where this job's messages go; the same kind of address serves the replica's own."""
        import ray

        return "127.0.0.1" if self.hub.startswith("tcp://127.") else str(ray.util.get_node_ip_address())

    def flags(self) -> list[str]:
        return ["--tp-size", str(self.gpus), *self.extra]
