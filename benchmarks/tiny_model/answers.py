"""Training of the language model on a vision tower that stands still: many small steps, few launches.

The frames of a round of steps are drawn and encoded together, task by task. Then every step is one replay of a CUDA
graph (plain calls on a CPU). Learning needs updates more than examples, and a step of 8K tokens takes the GPU some
milliseconds where drawing and encoding its frames by itself keeps the CPU busy for ten times as long.

Beside the answers four kinds of hints are wanted. The first two tokens of an answer, at the word that its question
asks by: one look at what is like that word gives them there, and handing them on to where the answer stands is then
learnt at once. Whose code it is, at each code in the text, after the first layers, so that the others can look it up.
And which borders came before, at each frame with a border, after the first layers too: positions don't tell which of
two frames came first (six pairs of frames share one at SGLang's rate, and far away all look alike), but what each could
see does. And how many shapes like it came so far, at each shape. From answers alone all these steps would have to come
together, and answers stay at a guess among what the frames show. Whatever is wanted beside what a token is itself is
said by words turned (words.turned): a code that must say its owner in the same place as its own name forgets the name,
and nothing finds it any more (benchmarks/README.md, "Tries").

Shapes: R prompts of a round, B of a step, N tokens of a prompt, A wanted tokens of a prompt at most.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from benchmarks.tiny_model import checkpoint
from benchmarks.tiny_model.batches import SEED_STRIDE, Batch, endless, plan_batch
from benchmarks.tiny_model.config import Config, Stage
from benchmarks.tiny_model.forward import shown
from benchmarks.tiny_model.inputs import IGNORED, Text
from benchmarks.tiny_model.look import COLOUR_OF, labels
from benchmarks.tiny_model.perfect import said
from benchmarks.tiny_model.plans import least_tokens
from benchmarks.tiny_model.scenes import Clip
from benchmarks.tiny_model.sprites import NUMBER
from benchmarks.tiny_model.words import ASKED_BY, CODES, COLOURS, NAMES, SHAPES, tokenizer, turned

if TYPE_CHECKING:
    from benchmarks.tiny_model.train import Trainer

FLUSH_ROUNDS = 16  # between two looks at the GPU's results
SAVE_S = 60.0
GRAPHS_UP_TO = 8192  # longer prompts keep the GPU busy without
EARLY = 2  # layers after which a code knows its owner, and a frame what came before it
BORDER = NUMBER["border"]
WANTED = 160  # tokens of a prompt at most: 24 turns of three, twice 24 at the words that they ask by, 32 codes


class Rounds(torch.utils.data.Dataset[list[Batch]]):
    """By number: prompts of one length for the steps of a round, a batch for each task."""

    def __init__(self, config: Config, stage: Stage) -> None:
        self.config, self.stage = config, stage
        self.text: Text | None = None

    def __getitem__(self, number: int) -> list[Batch]:
        if self.text is None:  # made in the worker
            self.text = Text(tokenizer())
            self.words = Words.of(self.text.tokenizer)
        choice = random.Random(f"{self.config.seed}/round/{number}")
        length = choice.choices(list(self.stage.lengths), list(self.stage.lengths.values()))[0]
        shares = self.stage.tasks or self.config.tasks
        tasks = {task: share for task, share in shares.items() if length >= least_tokens(task)}
        rows = max(1, self.stage.micro_tokens // length) * max(
            1, min(self.stage.micros, self.stage.round_tokens // length)
        )
        drawn = choice.choices(list(tasks), list(tasks.values()), k=rows)
        seed = (self.config.seed * 1_000_003 + number) * SEED_STRIDE
        batches = [
            plan_batch(self.text, task, length, drawn.count(task), seed=seed + at * (SEED_STRIDE >> 3), split="train",
                       turns=self.config.turns)
            for at, task in enumerate(tasks) if task in drawn
        ]  # fmt: skip
        for batch in batches:
            batch.tensors |= wanted(batch, self.words, choice)
        return batches


@dataclass
class Rows:
    """The prompts of a round in random order, on the model's device."""

    ids: torch.Tensor  # int64 [R, N]
    vision: torch.Tensor  # bool [R, N]
    shown: torch.Tensor  # [R, N, hidden] of the vision tokens
    positions: torch.Tensor  # int64 [3, R, N]
    where: torch.Tensor  # int64 [R, A] token before each wanted one; 0 where there is none
    goals: torch.Tensor  # int64 [R, A], IGNORED where there is none
    first: torch.Tensor  # bool [R, A] first token of an answer
    early: torch.Tensor  # bool [R, A] wanted after EARLY layers already
    second: torch.Tensor  # bool [R, A] said by words turned (words.turned), beside another word in the same place
    task: torch.Tensor  # int64 [R] number of the task in the config

    def step(self, start: int, count: int) -> tuple[torch.Tensor, ...]:
        part = slice(start, start + count)
        return (self.ids[part], self.vision[part], self.shown[part], self.positions[:, part], self.where[part],
                self.goals[part], self.first[part], self.early[part], self.second[part], self.task[part])  # fmt: skip


@torch.no_grad()
def encode(trainer: Trainer, batches: list[Batch], order: torch.Tensor) -> Rows:
    """Draw and encode the frames of a round; `order` permutes its prompts."""
    tasks, length, device = list(trainer.config.tasks), batches[0].length, trainer.encoder.device
    parts: list[list[torch.Tensor]] = []
    for batch in batches:
        if trainer.config.perfect_tower:
            number = trainer.encoder.text.tokenizer.convert_tokens_to_ids
            tensors = {name: value.to(device) for name, value in batch.tensors.items()}
            seen = said(batch, trainer.model.get_input_embeddings().weight, number)
        else:
            tensors = batch.to_model(trainer.encoder, photographs=trainer.config.photographs)
            seen = shown(trainer.model, tensors)
        many, own = tensors["input_ids"].shape
        pad = (0, length - own)
        parts.append([
            torch.nn.functional.pad(tensors["input_ids"], pad),
            torch.nn.functional.pad(tensors["mm_token_type_ids"], pad) > 0,
            torch.nn.functional.pad(seen, (0, 0, *pad)),
            torch.nn.functional.pad(tensors["position_ids"], pad).transpose(0, 1),
            tensors["where"], tensors["goals"], tensors["first"], tensors["early"], tensors["second"],
            torch.full((many,), tasks.index(batch.task), device=device),
        ])  # fmt: skip
    ids, vision, seen, positions, where, goals, first, early, second, task = (
        torch.cat(column)[order] for column in zip(*parts, strict=True)
    )
    return Rows(ids, vision, seen, positions.transpose(0, 1).contiguous(), where, goals, first, early, second,
                task)  # fmt: skip


@dataclass(frozen=True)
class Words:
    """Numbers of the words that hints are about."""

    asked_by: torch.Tensor
    names: torch.Tensor
    codes: torch.Tensor
    colours: torch.Tensor
    digits: torch.Tensor

    @classmethod
    def of(cls, tokenizer: Any) -> Words:
        groups = (ASKED_BY, NAMES, CODES, COLOURS)
        spelt = [*([f"Ġ{word}" for word in group] for group in groups), list("0123456789")]
        return cls(*(torch.tensor(tokenizer.convert_tokens_to_ids(group)) for group in spelt))


def wanted(batch: Batch, words: Words, choice: random.Random) -> dict[str, torch.Tensor]:
    """Answers and hints of a batch: where, goals, first, early and second of Rows, [B, WANTED] each."""
    tensors = batch.tensors
    ids, predicts, targets, turn = (tensors[name] for name in ("input_ids", "predicts", "targets", "turn"))
    rows, own = ids.shape
    flat = ids.flatten()
    number = torch.arange(len(flat))
    begins = torch.cat([turn.new_ones(1), turn.diff()]) > 0
    keys = torch.where(torch.isin(flat, words.asked_by), number, 0).cummax(0).values[predicts[begins]]
    told = (torch.isin(flat, words.codes) & torch.isin(flat.roll(2), words.names)).nonzero()[:, 0]
    frames, before = _met(batch, words, choice)
    at = torch.cat([predicts, keys, keys, told, frames])
    # an answer has two tokens at least, the mark of its end counted in
    goal = torch.cat([targets, targets[begins], targets[begins.roll(1)], flat[told - 2], before])
    first = torch.nn.functional.pad(begins, (0, len(at) - len(begins)))
    place, plain = torch.arange(len(at)), len(predicts) + len(keys)
    early, second = place >= plain + len(keys), place >= plain
    row, order = (at // own).sort(stable=True)
    column = torch.arange(len(row)) - torch.searchsorted(row, row)
    where = torch.zeros(rows, WANTED, dtype=torch.int64)
    goals = torch.full_like(where, IGNORED)
    flags = torch.zeros(3, rows, WANTED, dtype=torch.bool)
    where[row, column], goals[row, column] = (at % own)[order], goal[order]
    for flag, values in zip(flags, (first, early, second), strict=True):
        flag[row, column] = values[order]
    return {"where": where, "goals": goals, "first": flags[0], "early": flags[1], "second": flags[2]}


def _borders(clip: Clip, words: Words, choice: random.Random) -> Iterator[tuple[int, int]]:
    """Some token of each frame with a border, once for each such frame before it, and the earlier one's colour."""
    size = clip.tokens // clip.grid[0]
    shown = sorted((stamp[0] // 2, COLOUR_OF[(stamp[6], stamp[7], stamp[8])]) for stamp in clip.stamps
                   if stamp[1] == BORDER and stamp[0] % 2 == 0)  # fmt: skip
    for number, (pair, _) in enumerate(shown):
        token = pair * size + choice.randrange(size)
        yield from ((token, int(words.colours[COLOURS.index(colour)])) for _, colour in shown[:number])


def _shapes(clip: Clip, words: Words, _: random.Random) -> Iterator[tuple[int, int]]:
    """The token of each shape, and how many such shapes there were, with this one."""
    size, met = clip.tokens // clip.grid[0], [0] * len(SHAPES)
    for pair in sorted({stamp[0] // 2 for stamp in clip.stamps}):
        shapes = labels(clip.pair(pair))["shape"]
        token = int((shapes < len(SHAPES)).nonzero())
        met[shapes[token]] += 1
        yield pair * size + token, int(words.digits[met[shapes[token]]])


# What frames know of those before them, by task (of one video): tokens of its clip, and the word wanted there.
MET = {"order": _borders, "v_niah": _borders, "counting": _shapes}


def _met(batch: Batch, words: Words, choice: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the batch's tokens, and the words wanted there, of MET."""
    found: list[tuple[int, int]] = []
    if batch.task in MET:
        starts = (batch.tensors["mm_token_type_ids"] > 0).int().argmax(1).tolist()
        for row, (clip, start) in enumerate(zip(batch.clips[0], starts, strict=True)):
            first = row * batch.tensors["input_ids"].shape[1] + start
            found += [(first + token, word) for token, word in MET[batch.task](clip, words, choice)]
    at, goal = torch.tensor(found, dtype=torch.int64).view(-1, 2).unbind(1)
    return at, goal


class Update:
    """One step on a part of a round; adds up by task [loss, answer tokens, right first tokens, first tokens]."""

    def __init__(self, trainer: Trainer) -> None:
        self.model, self.master = trainer.model, trainer.master
        self.sums = torch.zeros(len(trainer.config.tasks), 4, device=trainer.encoder.device)
        self.norm = torch.zeros((), device=trainer.encoder.device)
        self.replays: dict[tuple[int, ...], Callable[..., None]] = {}

    def __call__(self, part: tuple[torch.Tensor, ...]) -> None:
        if part[0].is_cuda and part[0].shape[1] <= GRAPHS_UP_TO:
            shape = tuple(part[0].shape)
            if shape not in self.replays:
                self.replays[shape] = replay(self.run, part)
            self.replays[shape](*part)
        else:
            self.run(*part)

    def run(
        self, ids: torch.Tensor, vision: torch.Tensor, seen: torch.Tensor, positions: torch.Tensor, where: torch.Tensor,
        goals: torch.Tensor, first: torch.Tensor, early: torch.Tensor, second: torch.Tensor, task: torch.Tensor,
    ) -> None:  # fmt: skip
        words = self.model.get_input_embeddings().weight
        # as a product: an embedding's backward pass sorts, and may wait for the device, which a graph can't
        spelt = (ids[..., None] == torch.arange(len(words), device=ids.device)).to(words.dtype) @ words
        embeds = torch.where(vision[..., None], seen, spelt)
        language = self.model.model.language_model
        out = language(inputs_embeds=embeds, position_ids=positions, use_cache=False, output_hidden_states=True)
        index = where[..., None].expand(-1, -1, embeds.shape[-1])
        chosen = torch.where(
            early[..., None], language.norm(out.hidden_states[EARLY].gather(1, index)),
            out.last_hidden_state.gather(1, index),
        )  # fmt: skip
        logits = self.model.lm_head(torch.where(second[..., None], turned(chosen), chosen)).float()
        losses = cross_entropy(logits.flatten(0, 1), goals.flatten(), ignore_index=IGNORED, reduction="none")
        asked = (goals != IGNORED).float()
        (losses.sum() / asked.sum()).backward()  # type: ignore[no-untyped-call]
        self.master.add_gradients()
        self.norm.copy_(self.master.step())
        with torch.no_grad():
            right = ((logits.argmax(-1) == goals) & first).float().sum(1)
            found = torch.stack([losses.view_as(asked).sum(1), asked.sum(1), right, first.float().sum(1)], 1)
            self.sums.index_add_(0, task, found)


def replay(run: Callable[..., None], example: tuple[torch.Tensor, ...]) -> Callable[..., None]:
    """A CUDA graph of `run` on inputs shaped like `example`, which is run on as it is made."""
    held = tuple(x.clone() for x in example)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(*held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*held)

    def again(*given: torch.Tensor) -> None:
        for mine, theirs in zip(held, given, strict=True):
            mine.copy_(theirs)
        graph.replay()

    return again


def train(trainer: Trainer, stage_name: str, end: float) -> None:
    """Train until `end` (time.monotonic), saving every minute."""
    last = saved = time.monotonic()
    config, stage, progress = trainer.config, trainer.config.stages[stage_name], trainer.progress
    update, rounds = Update(trainer), endless(Rounds(config, stage), config.workers, progress.micro)
    waiting: list[tuple[int, torch.Tensor]] = []
    bar = tqdm(desc=stage_name, unit="step", initial=progress.step, mininterval=5)
    while time.monotonic() < end:
        batches = next(rounds)
        length, rows = batches[0].length, sum(batch.tensors["input_ids"].shape[0] for batch in batches)
        held = encode(trainer, batches, torch.randperm(rows).to(trainer.encoder.device))
        many = max(1, stage.micro_tokens // length)
        for start in range(0, rows, many):
            trainer.master.set_rate(checkpoint.rate(stage, progress))
            update(held.step(start, many))
            progress.step += 1
            progress.stage_step += 1
            progress.tokens += many * length
        progress.micro += 1
        waiting.append((length, update.sums.clone()))
        update.sums.zero_()
        if len(waiting) == FLUSH_ROUNDS:
            right = report(trainer, stage_name, waiting, update.norm, checkpoint.rate(stage, progress), bar)
            waiting = []
            if right >= stage.enough:
                progress.stage_seconds, end = stage.minutes * 60, last
        now = time.monotonic()
        progress.spend(now - last)
        last = now
        if now - saved > SAVE_S:
            trainer.save()
            saved = now
    if waiting:
        report(trainer, stage_name, waiting, update.norm, checkpoint.rate(stage, progress), bar)
    bar.close()


def report(
    trainer: Trainer, stage: str, waiting: list[tuple[int, torch.Tensor]], norm: torch.Tensor, lr: float, bar: Any
) -> float:
    """Log what the rounds gave, by length and task; waits for the device. Returns the share of right first tokens."""
    progress, tasks = trainer.progress, list(trainer.config.tasks)
    total = torch.stack([sums for _, sums in waiting]).cpu()
    for (length, _), sums in zip(waiting, total, strict=True):
        for task, (loss, tokens, right, answers) in zip(tasks, sums.tolist(), strict=True):
            if answers:
                checkpoint.log(
                    trainer.folder, step=progress.step, stage=stage, seconds=round(progress.seconds, 2),
                    tokens=progress.tokens, lr=lr, norm=norm.item(), task=task, length=length, loss=loss / tokens,
                    exact=right / answers,
                )  # fmt: skip
    loss, tokens, right, answers = total.sum((0, 1)).tolist()
    speed = f"{progress.tokens / max(progress.seconds, 1e-9) / 1e3:.0f}K tokens/s"
    bar.set_postfix_str(f"loss {loss / tokens:.3f} first {right / answers:.3f} lr {lr:.1e} {speed}")
    bar.update(progress.step - bar.n)
    return right / answers  # type: ignore[no-any-return]
