"""Train the small model: python -m benchmarks.tiny_model.train --folder F --minutes 9 --stage short

A run goes on from F/checkpoint.pt, ends itself after --minutes with a new one and a quick validation, and logs to
F/log.jsonl. The same command again goes on; --stage names the next stage of the curriculum. --plot draws the log,
--export OUT writes the model folder, and --weights OUT goes on from it on another machine, with a new optimizer.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.tiny_model import checkpoint, look
from benchmarks.tiny_model.batches import Batch, loader, plan_batch
from benchmarks.tiny_model.config import CONFIGS, Config, Stage
from benchmarks.tiny_model.forward import answer_logits, use_fast_attention
from benchmarks.tiny_model.inputs import Encoder
from benchmarks.tiny_model.model import export, new_model, save_files
from benchmarks.tiny_model.plans import least_tokens

VALIDATION_SEED = 1 << 45
FLUSH_STEPS = 10  # steps between two looks at the GPU's results


def exact(logits: torch.Tensor, batch: dict[str, Any], turns: int) -> torch.Tensor:
    """For each turn whether the most likely token is right at every token of the answer, float [turns]."""
    right = (logits.argmax(-1) == batch["targets"]).float()
    return torch.ones(turns, device=right.device).scatter_reduce_(0, batch["turn"], right, "amin")


def rate(stage: Stage, progress: checkpoint.Progress) -> float:
    """The learning rate: a warm-up by steps, then half a cosine by the time spent in the stage."""
    done = min(1.0, progress.stage_seconds / (stage.minutes * 60))
    warm = min(1.0, (progress.stage_step + 1) / stage.warmup_steps)
    return warm * (stage.lr_end + (stage.lr - stage.lr_end) * (1 + math.cos(math.pi * done)) / 2)


@torch.no_grad()
def validate(model: Any, encoder: Encoder, config: Config, longest: int, limit_s: float) -> list[dict[str, Any]]:
    """Exact match of answers on the test split by task and length; stops early after `limit_s`."""
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    for length in [length for length in config.valid_lengths if length <= longest]:
        for task in [task for task in config.tasks if length >= least_tokens(task)]:
            hits: list[torch.Tensor] = []
            least = min(config.valid_samples, max(4, (1 << 19) // length))
            count = max(1, min(least, (1 << 17) // length))
            for number in range(0, least, count):
                if time.monotonic() - begun > limit_s:
                    return rows
                seed = VALIDATION_SEED + number * 1000
                batch = plan_batch(encoder.text, task, length, count, seed=seed, split="test", turns=4)
                tensors = batch.to_model(encoder, photographs=config.photographs)
                hits.append(exact(answer_logits(model, tensors), tensors, batch.turns))
            got = torch.cat(hits)
            rows.append({"task": task, "length": length, "exact": got.mean().item(), "answers": len(got)})
    return rows


class Trainer:
    """A model with its optimizer and progress, from the folder or new."""

    def __init__(self, folder: Path, config: Config, device: str, weights: Path | None = None) -> None:
        save_files(folder)
        self.folder, self.config = folder, config
        self.encoder = Encoder(folder, device)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.model = new_model(config.sizes, config.seed)
        float_weights = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        self.model.to(device, dtype)
        use_fast_attention(self.model)
        self.master = checkpoint.Master(self.model, config)
        for name, master in zip(self.master.names, self.master.masters, strict=True):
            master.data.copy_(float_weights[name])  # not rounded to bf16
        self.progress = checkpoint.load(folder, self.master)
        if weights is not None and self.progress.step == 0:
            self.progress = checkpoint.load_export(weights, self.master)

    def micro(self, batch: Batch, share: float) -> torch.Tensor:
        """Forward and backward of one micro-batch; [loss, exact match] on the device."""
        tensors = batch.to_model(self.encoder, photographs=self.config.photographs)
        logits = answer_logits(self.model, tensors)
        loss = cross_entropy(logits, tensors["targets"])
        (loss * share).backward()  # type: ignore[no-untyped-call]
        self.master.add_gradients()
        return torch.stack([loss.detach(), exact(logits.detach(), tensors, batch.turns).mean()])

    def save(self) -> None:
        checkpoint.save(self.folder, self.master, self.progress)

    def run(self, stage_name: str, minutes: float) -> None:
        """Train for `minutes`, validation included."""
        begun, stage, progress = time.monotonic(), self.config.stages[stage_name], self.progress
        if stage_name == "look":
            return look.train(self, stage_name, stage, minutes)
        if progress.stage != stage_name:
            progress.stage, progress.stage_step, progress.stage_seconds = stage_name, 0, 0.0
        batches = loader(self.config, stage, progress.micro)
        last = saved = time.monotonic()
        waiting: list[tuple[dict[str, Any], torch.Tensor]] = []
        validation_s = min(60.0, minutes * 60 * 0.12)
        bar = tqdm(unit="step", initial=progress.step, mininterval=5)
        self.model.train()
        while time.monotonic() - begun < minutes * 60 - validation_s:
            lr = rate(stage, progress)
            for _ in range(stage.micros):
                batch = next(batches)
                result = self.micro(batch, 1 / stage.micros)
                progress.micro += 1
                progress.tokens += batch.tensors["input_ids"].numel()
                waiting.append(({"task": batch.task, "length": batch.length}, result))
            norm = self.master.step(lr)
            progress.step += 1
            progress.stage_step += 1
            if progress.step % FLUSH_STEPS == 0:
                numbers = torch.stack([result for _, result in waiting]).tolist()
                now = time.monotonic()
                progress.seconds += now - last
                progress.stage_seconds += now - last
                last = now
                for (what, _), (loss, match) in zip(waiting, numbers, strict=True):
                    checkpoint.log(
                        self.folder, step=progress.step, stage=stage_name, seconds=round(progress.seconds, 2),
                        tokens=progress.tokens, lr=lr, norm=norm.item(), loss=loss, exact=match, **what,
                    )  # fmt: skip
                speed = f"{progress.tokens / max(progress.seconds, 1e-9) / 1e3:.0f}K tokens/s"
                mean = [sum(column) / len(numbers) for column in zip(*numbers, strict=True)]
                bar.set_postfix_str(f"loss {mean[0]:.3f} exact {mean[1]:.3f} lr {lr:.1e} {speed}")
                bar.update(FLUSH_STEPS)
                waiting = []
                if now - saved > self.config.save_every_s:
                    self.save()
                    saved = now
        bar.close()
        del batches
        self.save()
        self.model.eval()
        left = minutes * 60 - (time.monotonic() - begun)
        rows = validate(self.model, self.encoder, self.config, max(stage.lengths), left)
        for row in rows:
            checkpoint.log(self.folder, step=progress.step, valid=True, seconds=round(progress.seconds, 2), **row)
            print(f"{row['task']:9s} {row['length']:7d} tokens: exact {row['exact']:.3f} of {row['answers']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", choices=CONFIGS, default="h200")
    parser.add_argument("--stage", help="default: the config's first")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--weights", type=Path, help="an --export of an earlier run to go on from where there is no checkpoint"
    )
    parser.add_argument("--plot", action="store_true", help="only draw F/log.jsonl as F/learning.png")
    parser.add_argument("--export", type=Path, metavar="OUT", help="only write the model folder")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config = CONFIGS[args.config]
    if args.plot:
        from benchmarks.tiny_model.plot import plot

        return print(plot(args.folder))
    stage = args.stage or next(iter(config.stages))
    if stage not in config.stages:
        parser.error(f"--stage {stage}: needs one of {list(config.stages)}")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and here each batch has its own
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(args.folder, config, device, args.weights)
    if args.export:
        size = export(trainer.model, args.export)
        checkpoint.save_progress(args.export, trainer.progress)
        return print(f"{args.export}: {size / 2**20:.2f} MiB of weights, step {trainer.progress.step}")
    trainer.run(stage, args.minutes)


if __name__ == "__main__":
    main()
