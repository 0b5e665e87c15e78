"""Time to first token of one long video over N GPUs, from figures measured on one. Pure functions.

Assumed:
* A chunk's linear layers, norms and copies take time by its tokens, split evenly over the ranks (true while a rank has
  thousands of rows); sparse attention too, at budgets that don't grow with the prompt, times the balance of tiles.
* An estimate looks at every key once a chunk and is shared out; choosing budgets and copying keys into order are by
  keys too, and every rank repeats them. Choosing blocks is by queries times keys, each rank its own queries.
* Keys are waited for; values come while the estimate runs. Every other exchange costs its latency. An all-gather of n
  bytes over P ranks takes n * (P - 1) / P over the bytes that a GPU receives a second.
* Across hosts either pipeline stages, a context-parallel group a host: whole layers, the slowest stage counts, chunks
  follow one another through the stages. Or one group, whose gather brings a host's missing rows over all its NICs.
* Decode of the video file by its CPU workers and the vision tower come before the prefill, one after another (nothing
  overlaps yet). A pipeline's vision tower is the first stage's.
* One request, nothing else running; no radix hit.

Legend: P ranks that share a chunk, q tokens of a chunk, k keys up to its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One GPU's seconds, and a model's sizes.

    Args:
        layers: of the language model; kv_bytes: of keys and values of a token, all layers; row_bytes: of the residual
            stream of a token.
        linear, attention: seconds a token. tiles: seconds a query token and key.
        estimate, repeated: seconds a key and chunk.
        vision: seconds a token; decode: seconds a token of one CPU worker; 0 leaves them out.
    """

    layers: int
    kv_bytes: int
    row_bytes: int
    linear: float
    attention: float
    tiles: float
    estimate: float
    repeated: float
    vision: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bytes that a GPU receives a second, and the seconds of a small exchange.

    The defaults inside a host were measured on four H200 (all-gather of 1 GiB 2.5 ms, of 16 MiB 0.08 ms); between hosts
    they are one 400 Gbit/s NIC a GPU at nine tenths, not measured.
    """

    gather: float = 323e9
    latency: float = 40e-6
    host: float = 45e9
    exchanges: int = 8  # a layer and chunk: K, V, sampled queries, two for each recipe that estimates over all keys


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds by part, of a rank of the slowest stage; `waiting` is the pipeline's. kv_bytes: on each GPU."""

    parts: dict[str, float]
    kv_bytes: float

    @property
    def ttft(self) -> float:
        return sum(self.parts.values())


def chunk_bounds(tokens: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(q, k) of each chunk."""
    for start in range(0, tokens, chunk):
        end = min(start + chunk, tokens)
        yield end - start, end


def predict(
    figures: Figures,
    links: Links,
    *,
    tokens: int,
    gpus: int,
    chunk: int,
    hosts: int = 1,
    pipeline: bool = True,
    balance: float = 1.0,
    workers: int = 1,
) -> Prediction:
    """Time to first token of a prompt.

    Args:
        tokens: of the prompt; chunk: tokens that are prefilled at once.
        hosts: over which the GPUs are spread evenly; pipeline: between hosts, stages instead of one gather.
        balance: tiles of the fullest rank over the mean.
        workers: CPU processes that decode.

    Raises:
        ValueError: a number below 1, or GPUs that the hosts don't divide.
    """
    numbers = {"tokens": tokens, "gpus": gpus, "chunk": chunk, "hosts": hosts, "balance": balance, "workers": workers}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}: needs at least 1")
    if gpus % hosts:
        raise ValueError(f"gpus={gpus} over hosts={hosts}: needs a number that the hosts divide")
    stages = min(hosts, figures.layers) if pipeline else 1
    ranks = gpus // hosts if pipeline else gpus
    layers = -(-figures.layers // stages)  # of the slowest stage
    steps = [
        _chunk(figures, links, q, k, ranks, hosts // stages if not pipeline else 1, layers, balance)
        for q, k in chunk_bounds(tokens, chunk)
    ]  # fmt: skip
    parts = {name: sum(step[name] for step in steps) for name in steps[0]}
    ends = [0.0] * stages  # of the last chunk in each stage
    for (q, _), step in zip(chunk_bounds(tokens, chunk), steps, strict=True):
        ready = 0.0
        for stage in range(stages):
            ends[stage] = max(ready, ends[stage]) + sum(step.values())
            ready = ends[stage] + q * figures.row_bytes / ranks / links.host + links.latency
    before = {
        "decode": tokens * figures.decode / workers,
        "vision": tokens * figures.vision / ranks,
    }
    waiting = {"waiting": max(0.0, ends[-1] - sum(parts.values()))}
    return Prediction(parts=before | parts | waiting, kv_bytes=tokens * figures.kv_bytes * layers / figures.layers)


def _chunk(
    figures: Figures, links: Links, q: int, k: int, ranks: int, hosts: int, layers: int, balance: float
) -> dict[str, float]:
    """Seconds of a chunk on a rank, for `layers` layers. hosts: over which the ranks are spread."""
    share = layers / figures.layers
    estimate = k * figures.estimate / ranks
    half = q * figures.kv_bytes / 2 * share  # K, and again V
    arrives = half * (ranks - 1) / ranks / links.gather
    if hosts > 1:  # each host's missing rows come over its NICs, then go round inside it
        arrives += half * (hosts - 1) / hosts / (links.host * ranks / hosts)
    alone = ranks == 1
    return {
        "linear": q * figures.linear / ranks * share,
        "attention": q * figures.attention / ranks * share * balance,
        "estimate": (estimate + q * k * figures.tiles / ranks) * share,
        "repeated": k * figures.repeated * share,
        "gather": 0.0 if alone else arrives + max(0.0, arrives - estimate * share),
        "latency": 0.0 if alone else links.exchanges * links.latency * layers,
    }
