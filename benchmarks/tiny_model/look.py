"""The first stage of training: the vision tower learns to tell what a frame shows.

Heads on each token of a frame name its border, glyph, ball and cell, and of shapes and captions what lies within the
token; they are thrown away afterwards. They are the words' own embeddings: the tokens come to say in the language
model's terms what a frame shows, so that a question's word and the frame that it asks for are alike before the language
model has learnt anything. Learnt from answers alone this takes many times longer: before the tower sees anything there
is nothing to look up, and before anything is looked up there is nothing to see for.

The heads leave open all that no word names, and the tokens grow there: after ten minutes they were ten times as long as
a word, at a cosine of 0.14 to what they were to say, and the language model hardly learnt to look frames up. So a last
stage also wants each token near the sum of its words, and begins with that sum fitted by least squares, which brings
the cosine to 0.93.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, pad
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
NEAR_LOCAL, NEAR_PLAIN = 5.0, 0.2  # weights of the distance: a token that shows something local; one that shows nothing
FITTED_ON, RIDGE = 256, 1e-4  # batches of the fit; of the features' mean square, added to it
PLAIN = 0.1  # unmarked pairs of frames to each marked one

Seen = tuple[torch.Tensor, dict[str, torch.Tensor]]  # tokens of pairs of frames, and their labels


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
        self.scale = SHARPNESS / embeddings.detach().float().square().sum(1).median()
        self.said = spoken(embeddings, number)
        self.none = torch.nn.ModuleDict({name: torch.nn.Linear(embeddings.shape[1], 1) for name in self.said})

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = tokens.float()
        return {
            name: torch.cat([tokens @ (self.scale * self.said[name]).t(), none(tokens)], -1)
            for name, none in self.none.items()
        }


def weights(found: dict[str, torch.Tensor], words: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a token's distance to its words counts for, float32 [...], from labels of that shape."""
    some = {name: value < len(words[name]) for name, value in found.items()}
    near = torch.where(torch.stack(list(some.values())).any(0), 1.0, NEAR_PLAIN)
    return near.masked_fill(torch.stack([some[name] for name in LOCAL]).any(0), NEAR_LOCAL)


def summed(found: dict[str, torch.Tensor], words: dict[str, torch.Tensor]) -> torch.Tensor:
    """What tokens are to say, [..., hidden], from labels [...]: the sum of the words of all that they show."""
    return torch.stack([pad(words[name], (0, 0, 0, 1))[value] for name, value in found.items()]).sum(0)


def apart(tokens: torch.Tensor, found: dict[str, torch.Tensor], words: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean squared distance of tokens [..., hidden] to what they are to say, weighted, by labels [...]."""
    weight = weights(found, words)
    return ((tokens.float() - summed(found, words)).square().sum(-1) * weight).sum() / weight.sum()


def frames(trainer: Trainer, stage_name: str) -> Iterator[Seen]:
    """Endless batches of pairs of frames: the vision tower's tokens [pairs, tokens, hidden], and their labels."""
    progress, encoder, stage = trainer.progress, trainer.encoder, trainer.config.stages[stage_name]
    for batch in loader(trainer.config, stage, progress.micro):
        progress.micro += 1
        if not batch.clips or any(clip.frames < 2 for shown in batch.clips for clip in shown):
            continue
        clips = marked_pairs(batch, random.Random(progress.micro))
        clips = clips[: max(1, stage.micro_tokens // clips[0].tokens)]
        pixels = encoder.pixels(render(clips, encoder.device, photographs=trainer.config.photographs), video=True)
        t, h, w = len(clips), clips[0].height // 14, clips[0].width // 14
        tokens = vision_features(trainer.model, pixels, [(t, h, w)]).view(t, h * w // 4, -1)
        rows = [labels(clip) for clip in clips]
        yield tokens, {name: torch.stack([row[name] for row in rows]).to(tokens.device, non_blocking=True)
                       for name in rows[0]}  # fmt: skip


@torch.no_grad()
def fit(trainer: Trainer, seen: Iterator[Seen], heads: Heads) -> None:
    """Set the tower's last map to the one whose tokens are nearest to what they are to say (ridge regression)."""
    mlp = trainer.model.model.visual.merger.mlp
    last, mlp[-1] = mlp[-1], torch.nn.Identity()
    size = last.in_features + 1
    square, product = (torch.zeros(size, many, device=last.weight.device) for many in (size, last.out_features))
    for tokens, found in tqdm(itertools.islice(seen, FITTED_ON), desc="fit", unit="batch", total=FITTED_ON):
        x = pad(tokens.float().flatten(0, 1), (0, 1), value=1.0)
        weighted = x * weights(found, heads.said).flatten()[:, None]
        square += x.t() @ weighted
        product += weighted.t() @ summed(found, heads.said).flatten(0, 1)
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    solved = torch.linalg.solve(square.double(), product.double())
    last.weight.copy_(solved[:-1].t())
    last.bias.copy_(solved[-1])
    mlp[-1] = last


def train(trainer: Trainer, stage_name: str, end: float) -> None:
    """Train vision tower and heads until `end` (time.monotonic)."""
    last, progress, encoder = time.monotonic(), trainer.progress, trainer.encoder
    stage = trainer.config.stages[stage_name]
    words = trainer.model.get_input_embeddings().weight
    heads = Heads(words, encoder.text.tokenizer.convert_tokens_to_ids).to(encoder.device)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=stage.lr, betas=trainer.config.betas)
    seen, bar = frames(trainer, stage_name), tqdm(unit="step", mininterval=5)
    if stage.near and not progress.stage_step:
        fit(trainer, seen, heads)
        trainer.trains_vision(True)  # an optimizer for the weights as they are now
    while time.monotonic() < end or not progress.stage_step:  # a step at least: the fit is over then
        losses, rights = [], []
        for tokens, found in itertools.islice(seen, stage.micros):
            loss = torch.zeros((), device=tokens.device)
            for name, logits in heads(tokens).items():
                goal = found[name]
                some = (goal < logits.shape[-1] - 1).float()  # few tokens show anything local
                weight = 1 + LOCAL_WEIGHT * some if name in LOCAL else torch.ones_like(some)
                if stage.near:  # which of the words; whether there is one, the distance tells
                    logits, weight, goal = logits[..., :-1], some, goal.clamp(max=logits.shape[-1] - 2)
                losses_of = cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").view_as(weight)
                loss = loss + (losses_of * weight).sum() / weight.sum().clamp(min=1.0)
                rights.append((((logits.argmax(-1) == goal) * some).sum(), some.sum()))
            if stage.near:
                loss = loss + stage.near * heads.scale / SHARPNESS * apart(tokens, found, heads.said)
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
