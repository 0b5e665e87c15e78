"""fp32 weights with their optimizer beside a model in any dtype, and everything a later run goes on from."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.tiny_model.config import Config, Stage

CHECKPOINT, LOG, PROGRESS = "checkpoint.pt", "log.jsonl", "training.json"


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

    def begin(self, stage: str) -> None:
        self.stage, self.stage_step, self.stage_seconds = stage, 0, 0.0

    def spend(self, seconds: float) -> None:
        self.seconds += seconds
        self.stage_seconds += seconds


def rate(stage: Stage, progress: Progress) -> float:
    """The learning rate: a warm-up by steps, then half a cosine by the time spent in the stage."""
    done = min(1.0, progress.stage_seconds / (stage.minutes * 60))
    warm = min(1.0, (progress.stage_step + 1) / stage.warmup_steps)
    return warm * (stage.lr_end + (stage.lr - stage.lr_end) * (1 + math.cos(math.pi * done)) / 2)


class Master:
    """AdamW on fp32 copies of the weights that are trained (the weights themselves where the model is fp32)."""

    def __init__(self, model: Any, config: Config) -> None:
        self.model = model
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
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
        cuda = self.masters[0].is_cuda  # there steps become CUDA graphs: the rate is a tensor
        self.lr = torch.zeros((), device=self.masters[0].device)
        lr = self.lr if cuda else 0.0
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=1e-8, fused=cuda, capturable=cuda)

    def set_rate(self, lr: float) -> None:
        """The learning rate of the steps that follow."""
        self.lr.fill_(lr)
        if not self.lr.is_cuda:
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Take the gradients of one micro-batch off the model and sum them in fp32."""
        for weight, total in zip(self.weights, self.sums, strict=True):
            if weight.grad is not None:
                total += weight.grad
                weight.grad = None

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """One clipped update; returns the gradients' norm. A gradient that is not finite is left out."""
        norm = torch.nn.utils.get_total_norm(self.sums)
        factor = torch.where(norm.isfinite(), (self.clip / (norm + 1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        for total in self.sums:
            total.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(self.sums, factor)
        for master, total in zip(self.masters, self.sums, strict=True):
            master.grad = total
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        torch._foreach_zero_(self.sums)
        if not self.same:
            torch._foreach_copy_(self.weights, self.masters)
        return norm

    def state(self) -> dict[str, Any]:
        """All weights, trained or not, and the optimizer with the names of what it trains."""
        weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        weights |= {name: master.detach() for name, master in zip(self.names, self.masters, strict=True)}
        return {"weights": weights, "trained": self.names, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over weights, and the optimizer if it trained the same ones."""
        for name, weight in self.model.named_parameters():
            weight.copy_(state["weights"][name])
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(state["weights"][name])
        if state["trained"] == self.names:
            self.optimizer.load_state_dict(state["optimizer"])


def save(folder: Path, master: Master, progress: Progress) -> None:
    """Write the checkpoint; a broken-off write leaves the one before."""
    state = master.state() | {"progress": asdict(progress), "rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    fresh = folder / f"{CHECKPOINT}.tmp"
    torch.save(state, fresh)
    os.replace(fresh, folder / CHECKPOINT)


def load_progress(folder: Path, weights: Path | None, first: str) -> Progress:
    """Of the folder's checkpoint, else of `weights` (with its log, if it is there), else none, in stage `first`."""
    path = folder / CHECKPOINT
    if path.is_file():
        return Progress(**torch.load(path, map_location="cpu", weights_only=True)["progress"])
    if weights is not None:
        if (weights / LOG).is_file():  # the model that ships has none
            shutil.copy(weights / LOG, folder / LOG)
        return Progress(**json.loads((weights / PROGRESS).read_text()))
    return Progress(stage=first)


def load(folder: Path, weights: Path | None, master: Master) -> None:
    """Put the folder's checkpoint into `master`, else `weights`, whose optimizer starts anew."""
    path = folder / CHECKPOINT
    if path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)
        master.load(state)
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_rng"])
    elif weights is not None:
        stored: dict[str, torch.Tensor] = {}
        for file in sorted(weights.glob("*.safetensors")):
            stored |= load_file(file)
        named = {}
        for name, _ in master.model.named_parameters():
            older = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
            named[name] = stored[name] if name in stored else stored[older]
        master.load({"weights": named, "trained": None})


def save_progress(folder: Path, model: Path, progress: Progress) -> None:
    """Beside exported weights: how they came about, and what a later run counts on from."""
    (model / PROGRESS).write_text(json.dumps(asdict(progress), indent=1) + "\n")
    shutil.copy(folder / LOG, model / LOG)


def log(folder: Path, **entry: Any) -> None:
    """Append one line to the log."""
    with (folder / LOG).open("a") as file:
        file.write(json.dumps(entry) + "\n")
