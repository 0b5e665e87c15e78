"""Train the small model: python -m benchmarks.tiny_model.train --folder F --minutes 9

A run goes on from F/checkpoint.pt, through the stages of the curriculum, ends itself after --minutes and logs to
F/log.jsonl; the same command again goes on. F/model is the model's folder, written anew every minute; on another
machine --weights F/model goes on from it with a new optimizer. --plot draws the log.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.tiny_model import answers, checkpoint, look
from benchmarks.tiny_model.batches import at_once, plan_batch
from benchmarks.tiny_model.config import CONFIGS, Config
from benchmarks.tiny_model.forward import answer_logits, exact, use_fast_attention
from benchmarks.tiny_model.inputs import Encoder
from benchmarks.tiny_model.model import export, new_model, save_files
from benchmarks.tiny_model.plans import least_tokens

VALIDATION_SEED = 1 << 45
LOOK = "look"  # how the names of the vision tower's stages begin
MODEL = "model"  # the model's folder in a training's
VALIDATION_S, VALIDATION_SHARE = 10.0, 0.12  # at most, at the end of a stage and of a run


@torch.no_grad()
def validate(model: Any, encoder: Encoder, config: Config, longest: int, limit_s: float) -> list[dict[str, Any]]:
    """Exact match of answers on the test split by task and length; stops early after `limit_s`."""
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    for length in [length for length in config.valid_lengths if length <= longest]:
        for task in [task for task in config.tasks if length >= least_tokens(task)]:
            hits: list[torch.Tensor] = []
            least = min(config.valid_samples, max(4, (1 << 19) // length))
            count = at_once(least, length)
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
    """A model with its optimizer and progress, from the folder, from `weights` or new.

    Stages named look... train the vision tower (look.py), the others all the rest (answers.py).
    """

    def __init__(self, folder: Path, config: Config, device: str, weights: Path | None = None) -> None:
        save_files(folder)
        self.folder, self.config = folder, config
        self.encoder = Encoder(folder, device)
        self.model = new_model(config.sizes, config.seed)
        self.model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        use_fast_attention(self.model)
        stages = list(config.stages)
        self.progress = checkpoint.load_progress(folder, weights, stages[0])
        name = self.progress.stage
        if self.progress.stage_seconds >= config.stages[name].minutes * 60 and name != stages[-1]:
            self.progress.begin(stages[stages.index(name) + 1])  # of weights whose curriculum ended there
        (folder / checkpoint.LOG).touch()
        self.trains_vision(self.progress.stage.startswith(LOOK))
        checkpoint.load(folder, weights, self.master)

    def trains_vision(self, vision: bool) -> None:
        """Train the vision tower, or all the rest, with an optimizer that begins anew."""
        self.model.model.visual.requires_grad_(vision)
        self.model.model.language_model.requires_grad_(not vision)
        self.model.lm_head.requires_grad_(not vision)
        self.master = checkpoint.Master(self.model, self.config)

    def save(self) -> None:
        """The checkpoint, and beside it the model's folder, from which --weights goes on elsewhere."""
        checkpoint.save(self.folder, self.master, self.progress)
        export(self.model, self.folder / MODEL)
        checkpoint.save_progress(self.folder, self.folder / MODEL, self.progress)

    def run(self, minutes: float) -> bool:
        """Train for `minutes`, through as many stages as they last; True if the last stage is done."""
        end, stages = time.monotonic() + minutes * 60, list(self.config.stages)
        limit = min(VALIDATION_S, VALIDATION_SHARE * minutes * 60)
        while True:
            name = self.progress.stage
            stage = self.config.stages[name]
            left = stage.minutes * 60 - self.progress.stage_seconds
            stops = min(time.monotonic() + left, end - limit)
            (look if name.startswith(LOOK) else answers).train(self, name, stops)
            done = self.progress.stage_seconds >= stage.minutes * 60
            self.save()
            if not name.startswith(LOOK) and (done or time.monotonic() > end - 2 * limit):
                self._validate(max(stage.lengths), limit)
            if done and name == stages[-1]:
                return True
            if done:
                self.progress.begin(stages[stages.index(name) + 1])
                self.trains_vision(self.progress.stage.startswith(LOOK))
            if time.monotonic() > end - 2 * limit:
                self.save()
                return False

    def _validate(self, longest: int, limit_s: float) -> None:
        self.model.eval()
        for row in validate(self.model, self.encoder, self.config, longest, limit_s):
            checkpoint.log(
                self.folder, step=self.progress.step, valid=True, seconds=round(self.progress.seconds, 2), **row
            )
            print(f"{row['task']:9s} {row['length']:7d} tokens: exact {row['exact']:.3f} of {row['answers']}")
        self.model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--config", choices=CONFIGS, default="h200")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this run; the next one goes on; default: 9")
    parser.add_argument(
        "--weights", type=Path, help="F/model of an earlier run, to go on from where F has no checkpoint"
    )
    parser.add_argument("--plot", action="store_true", help="only draw F/log.jsonl as F/learning.png")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.plot:
        from benchmarks.tiny_model.plot import plot

        return print(plot(args.folder))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and here each batch has its own
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trainer = Trainer(args.folder, CONFIGS[args.config], device, args.weights)
    done = trainer.run(args.minutes)
    print(f"{args.folder / MODEL}: step {trainer.progress.step}, {'done' if done else 'the same command goes on'}")


if __name__ == "__main__":
    main()
