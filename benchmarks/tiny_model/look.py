"""The first stage of training: the vision tower learns to tell what a frame shows.

Heads on each token of a frame name its border, glyph, ball and cell, and of shapes and captions what lies within the
token; they are thrown away afterwards. They are the words' own embeddings: the tokens come to say in the language
model's terms what a frame shows, so that a question's word and the frame that it asks for are alike before the language
model has learnt anything. Learnt from answers alone this takes many times longer: before the tower sees anything there
is nothing to look up, and before anything is looked up there is nothing to see for.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.tiny_model import checkpoint, sprites
from benchmarks.tiny_model.batches import Batch, loader
from benchmarks.tiny_model.forward import vision_features
from benchmarks.tiny_model.scenes import Clip, render
from benchmarks.tiny_model.words import COLOURS, CORNERS, GLYPHS, PLACES, SHAPES, turned

if TYPE_CHECKING:
    from benchmarks.tiny_model.train import Trainer

# Classes of each field; the last one is "none".
FIELDS = {"border": len(COLOURS), "glyph": len(GLYPHS), "ball": len(COLOURS), "cell": 9}  # of a frame: all its tokens
# Of a token: the shape whose middle it holds, so that a frame counts once however big it is; and the corner and the two
# digits of the number that reaches into it. All four numbers said by every token of a frame were never learnt.
LOCAL = {"shape": len(SHAPES), "corner": len(CORNERS), "digit 0": 10, "digit 1": 10}
TURNED = ("digit 1",)  # said by the words turned (words.turned): a token says both digits at once
TOKEN = 28  # pixels of a side
NAMES = {number: name for name, number in sprites.NUMBER.items()}
COLOUR_OF = {value: name for name, value in sprites.COLOUR_VALUES.items()}
SHARPNESS = 12.0  # logit of a word that a token says as loudly as the word's own embedding does
LOCAL_WEIGHT = 10.0  # of a token that shows something local, over one that does not
PLAIN = 0.1  # unmarked pairs of frames to each marked one


def labels(clip: Clip) -> dict[str, torch.Tensor]:
    """What a clip of one pair of frames shows, read off its stamps: int64 [tokens] for each field, row by row."""
    rows, columns = clip.height // TOKEN, clip.width // TOKEN
    found = {name: torch.full((rows, columns), none) for name, none in (FIELDS | LOCAL).items()}
    stamps = [stamp for stamp in clip.stamps if stamp[0] == 0]
    digits = [stamp for stamp in stamps if NAMES[stamp[1]] in GLYPHS]
    for _, sprite, x, y, w, h, *rgb in stamps:
        name, colour = NAMES[sprite], COLOUR_OF.get((rgb[0], rgb[1], rgb[2]))
        if name in ("border", "ball") and colour is not None:
            found[name][:] = COLOURS.index(colour)
        if name == "ball":
            across, down = (min(2, 3 * (2 * at + s) // (2 * side)) for at, s, side in
                            ((x, w, clip.width), (y, h, clip.height)))  # fmt: skip
            found["cell"][:] = 3 * down + across
        if name in SHAPES:
            row, column = min((y + h // 2) // TOKEN, rows - 1), min((x + w // 2) // TOKEN, columns - 1)
            found["shape"][row, column] = SHAPES.index(name)
        if name in GLYPHS and len(digits) == 1:
            found["glyph"][:] = GLYPHS.index(name)
    if len(digits) > 1:
        for number, corner in enumerate(CORNERS):
            mine = sorted((x, y, w, h, int(NAMES[sprite])) for _, sprite, x, y, w, h, *_ in digits
                          if (y < clip.height // 2) == (corner.startswith("top"))
                          and (x < clip.width // 2) == (corner.endswith("left")))  # fmt: skip
            (left, top, w, h, first), (right, *_, second) = mine
            box = slice(top // TOKEN, (top + h - 1) // TOKEN + 1), slice(left // TOKEN, (right + w - 1) // TOKEN + 1)
            for name, value in (("corner", number), ("digit 0", first), ("digit 1", second)):
                found[name][box] = value
    return {name: value.flatten() for name, value in found.items()}


def marked_pairs(batch: Batch, choice: random.Random) -> list[Clip]:
    """The pairs of frames of a batch's clips that show something, and a few that don't, each as a clip of its own."""
    out = []
    for clip in (clip for shown in batch.clips for clip in shown):
        marked = {stamp[0] // 2 for stamp in clip.stamps}
        plain = [pair for pair in range(clip.frames // 2) if pair not in marked]
        some = choice.sample(plain, min(len(plain), max(1, int(PLAIN * len(marked)))))
        out += [clip.pair(number) for number in sorted({*marked, *some})]
    return out


def spoken(embeddings: torch.Tensor, number: Callable[[str], int]) -> dict[str, torch.Tensor]:
    """The words that say each value of a field, [values, hidden] a field, as loud as one word each.

    Args:
        embeddings: of the words, [vocabulary, hidden].
        number: a word's number in the vocabulary.
    """
    digits = [[str(digit)] for digit in range(10)]
    said = {
        "border": [[f"Ġ{word}"] for word in COLOURS], "ball": [[f"Ġ{word}"] for word in COLOURS],
        "shape": [[f"Ġ{word}"] for word in SHAPES], "glyph": [[glyph] for glyph in GLYPHS],
        "cell": [[first, *(f"Ġ{word}" for word in rest)] for first, *rest in (place.split() for place in PLACES)],
        "corner": [[f"Ġ{word}" for word in corner.split()] for corner in CORNERS],
        "digit 0": digits, "digit 1": digits,
    }  # fmt: skip
    words = embeddings.detach().float()
    found = {
        name: torch.stack([words[[number(word) for word in value]].sum(0) / len(value) ** 0.5 for value in values])
        for name, values in said.items()
    }
    return found | {name: turned(found[name]) for name in TURNED}


class Heads(torch.nn.Module):
    """Logits of every field from tokens [..., hidden]; arguments as of `spoken`."""

    def __init__(self, embeddings: torch.Tensor, number: Callable[[str], int]) -> None:
        super().__init__()
        scale = SHARPNESS / embeddings.detach().float().square().sum(1).median()
        self.words = {name: words * scale for name, words in spoken(embeddings, number).items()}
        self.none = torch.nn.ModuleDict({name: torch.nn.Linear(embeddings.shape[1], 1) for name in self.words})

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = tokens.float()
        return {name: torch.cat([tokens @ self.words[name].t(), none(tokens)], -1) for name, none in self.none.items()}


def train(trainer: Trainer, stage_name: str, end: float) -> None:
    """Train vision tower and heads until `end` (time.monotonic)."""
    last, progress, encoder = time.monotonic(), trainer.progress, trainer.encoder
    stage = trainer.config.stages[stage_name]
    words = trainer.model.get_input_embeddings().weight
    heads = Heads(words, encoder.text.tokenizer.convert_tokens_to_ids).to(encoder.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=stage.lr, betas=trainer.config.betas)
    batches, bar = loader(trainer.config, stage, progress.micro), tqdm(unit="step", mininterval=5)
    while time.monotonic() < end:
        losses, rights = [], []
        for _ in range(stage.micros):
            batch = next(batches)
            progress.micro += 1
            if not batch.clips or any(clip.frames < 2 for shown in batch.clips for clip in shown):
                continue
            clips = marked_pairs(batch, random.Random(progress.micro))
            clips = clips[: stage.micro_tokens // (clips[0].tokens)]
            frames = render(clips, encoder.device, photographs=trainer.config.photographs)
            t, h, w = len(clips), clips[0].height // 14, clips[0].width // 14
            pixels = encoder.pixels(frames, video=True)
            tokens = vision_features(trainer.model, pixels, [(t, h, w)]).view(t, h * w // 4, -1)
            rows = [labels(clip) for clip in clips]
            loss = torch.zeros((), device=tokens.device)
            for name, logits in heads(tokens).items():
                goal = torch.stack([row[name] for row in rows]).to(tokens.device, non_blocking=True)
                some = (goal < logits.shape[-1] - 1).float()  # few tokens show anything local
                weight = 1 + LOCAL_WEIGHT * some if name in LOCAL else torch.ones_like(some)
                losses_of = cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").view_as(weight)
                loss = loss + (losses_of * weight).sum() / weight.sum()
                rights.append((((logits.argmax(-1) == goal) * some).sum(), some.sum()))
            (loss / stage.micros).backward()  # type: ignore[no-untyped-call]
            trainer.master.add_gradients()
            losses.append(loss.detach())
        progress.step += 1
        progress.stage_step += 1
        trainer.master.set_rate(checkpoint.rate(stage, progress))
        trainer.master.step()
        optimizer.step()
        optimizer.zero_grad()
        now = time.monotonic()
        progress.spend(now - last)
        last = now
        if progress.stage_step % 20 == 1 and losses:
            said, some = (torch.stack(column).sum().item() for column in zip(*rights, strict=True))
            loss_now, right = torch.stack(losses).mean().item(), said / max(some, 1.0)
            bar.set_postfix_str(f"loss {loss_now:.3f} right {right:.3f}")
            bar.update(20)
            checkpoint.log(
                trainer.folder, step=progress.step, stage=stage_name, loss=loss_now, right=right,
                seconds=round(progress.seconds, 2),
            )  # fmt: skip
    bar.close()
