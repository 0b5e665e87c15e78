"""fp32 weights with their optimizer beside a model in any dtype, and everything a later run goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny_model.config import Config


@dataclass
class Progress:
    """How far the training is."""

    step: int = 0
    micro: int = 0  # micro-batches taken
    tokens: int = 0
    seconds: float = 0.0
    stage: str = ""
    stage_step: int = 0
    stage_seconds: float = 0.0


class Master:
    """AdamW on fp32 copies of the model's weights (the weights themselves where the model is fp32)."""

    def __init__(self, model: Any, config: Config) -> None:
        named = list(model.named_parameters())
        self.names = [name for name, _ in named]
        self.weights = [weight for _, weight in named]
        self.same = self.weights[0].dtype == torch.float32
        self.masters = [w if self.same else w.detach().float().clone() for w in self.weights]
        self.sums = [torch.zeros_like(m, requires_grad=False) for m in self.masters]
        decays = [w.ndim > 1 and "embed_tokens" not in name for name, w in named]
        self.clip = config.clip
        groups = [
            {
                "params": [m for m, decay in zip(self.masters, decays, strict=True) if decay == kind],
                "weight_decay": config.weight_decay * kind,
            }
            for kind in (True, False)
        ]
        cuda = self.masters[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=1e-8, fused=cuda)

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Take the gradients of one micro-batch off the model and sum them in fp32."""
        for weight, total in zip(self.weights, self.sums, strict=True):
            if weight.grad is not None:
                total += weight.grad
                weight.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> torch.Tensor:
        """One clipped update; returns the gradients' norm. A gradient that is not finite is left out."""
        norm = torch.nn.utils.get_total_norm(self.sums)
        factor = torch.where(norm.isfinite(), (self.clip / (norm + 1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        for total in self.sums:
            total.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(self.sums, factor)
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        torch._foreach_zero_(self.sums)
        if not self.same:
            torch._foreach_copy_(self.weights, self.masters)
        return norm

    def state(self) -> dict[str, Any]:
        return {
            "weights": dict(zip(self.names, self.masters, strict=True)),
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        for name, master, weight in zip(self.names, self.masters, self.weights, strict=True):
            master.copy_(state["weights"][name])
            if not self.same:
                weight.copy_(master)
        self.optimizer.load_state_dict(state["optimizer"])


def save(folder: Path, master: Master, progress: Progress) -> None:
    """Write the checkpoint; a broken-off write leaves the one before."""
    state = master.state() | {"progress": asdict(progress), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    fresh = folder / "checkpoint.tmp"
    torch.save(state, fresh)
    os.replace(fresh, folder / "checkpoint.pt")


def load(folder: Path, master: Master) -> Progress:
    """Put the folder's checkpoint into `master`, or start anew where there is none."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return Progress()
    state = torch.load(path, map_location="cpu", weights_only=True)
    master.load(state)
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return Progress(**state["progress"])


PROGRESS = "training.json"


def save_progress(export: Path, progress: Progress) -> None:
    """Beside exported weights: how they came about, and what `load_export` counts on from."""
    (export / PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")


@torch.no_grad()
def load_export(export: Path, master: Master) -> Progress:
    """Put exported weights into `master`, whose optimizer starts anew."""
    from safetensors.torch import load_file

    stored = load_file(export / "model.safetensors")
    for name, weights, weight in zip(master.names, master.masters, master.weights, strict=True):
        key = (
            name
            if name in stored
            else name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        )
        weights.copy_(stored[key])
        weight.copy_(weights)
    return Progress(**json.loads((export / PROGRESS).read_text()))


def log(folder: Path, **entry: Any) -> None:
    """Append one line to log.jsonl."""
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")
