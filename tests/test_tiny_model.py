"""The small trained model: drawn frames hold the answers, inputs and forward pass are the real classes' own."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from benchmarks.tiny_model import answers, batches, checkpoint, evaluate, look, perfect, scenes, sprites, train, words
from benchmarks.tiny_model.answers import Rounds, Update, encode
from benchmarks.tiny_model.batches import Batch, collate, plan_batch
from benchmarks.tiny_model.config import CONFIGS, Sizes
from benchmarks.tiny_model.evaluate import accuracy, load
from benchmarks.tiny_model.forward import ATTENTION, answer_logits, exact, segment_attention, use_fast_attention
from benchmarks.tiny_model.inputs import Encoder, Text
from benchmarks.tiny_model.model import export, new_model
from benchmarks.tiny_model.plans import least_tokens
from benchmarks.tiny_model.tasks import PLANNERS, TASKS, Sample, drawn, make_plan, make_sample
from benchmarks.tiny_model.train import Trainer
from mm_sglang.layout import layout_from_processor

SMALL = Sizes(heads=2, kv_heads=1, layers=2, intermediate=64, vision_hidden=64, vision_heads=1, vision_intermediate=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    model = new_model(SMALL, 3)
    export(model, folder)
    return folder, model.eval()


@pytest.fixture(scope="module")
def encoder(made: tuple[Path, Any]) -> Encoder:
    return Encoder(made[0], "cpu")


def sample(task: str, **changed: Any) -> Sample:
    usual: dict[str, Any] = {"tokens": 640, "seed": 5, "split": "train", "turns": 6}
    return make_sample(task, **usual | changed)


def pixels(made: Sample) -> list[torch.Tensor]:
    return [part for kind, part in made.parts if kind != "text"]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_sample_and_another_a_different_one(task: str) -> None:
    one, again, other, test = (sample(task, **kw) for kw in ({}, {}, {"seed": 6}, {"split": "test"}))
    assert one.turns == again.turns and one.depth == again.depth and one.seconds == again.seconds
    assert all(torch.equal(a, b) for a, b in zip(pixels(one), pixels(again), strict=True))
    for different in (other, test):
        same_shapes = [part.shape for part in pixels(one)] == [part.shape for part in pixels(different)]
        assert not same_shapes or not all(
            torch.equal(a, b) for a, b in zip(pixels(one), pixels(different), strict=True)
        )


def test_test_videos_move_over_backgrounds_as_training_videos_never_do() -> None:
    seen: dict[str, set[tuple[int, int]]] = {"train": set(), "test": set()}
    for split, found in seen.items():
        for seed in range(60):
            for clip in make_plan("v_niah", tokens=640, seed=seed, split=split).clips:
                for a, b in zip(clip.camera, clip.camera[1:], strict=False):
                    if a[0] == b[0] and (moved := (b - a)[1:3]).any():
                        turn = torch.atan2(*torch.tensor(moved).flip(0)).item() / (2 * torch.pi) % 1
                        found.add((int(a[0]), int(turn * scenes.DIRECTIONS)))
    assert len(seen["train"]) > 50 and len(seen["test"]) > 30
    # Rounding at a sector's edge may move a direction to the next one, hence "almost none".
    assert len(seen["train"] & seen["test"]) <= 3


@pytest.mark.parametrize("task", PLANNERS)
@pytest.mark.parametrize("tokens", [512, 2048])
def test_a_sample_takes_about_the_tokens_asked_for_and_never_more(task: str, tokens: int, encoder: Encoder) -> None:
    for turns, depth in ((1, 0.5), (24, None)):
        batch = plan_batch(encoder.text, task, tokens, 2, seed=9, split="train", turns=turns, depth=depth)
        used = batch.tensors["input_ids"].shape[1]
        assert 0.6 * tokens <= used <= tokens
        if depth is not None:
            assert all(abs(got - depth) < 0.2 for got in batch.depths)


@pytest.mark.parametrize("task", PLANNERS)
def test_the_smallest_contexts_hold_together(task: str, encoder: Encoder) -> None:
    for tokens in range(least_tokens(task), least_tokens(task) + 200, 7):
        batch = plan_batch(encoder.text, task, tokens, 3, seed=tokens, split="train", turns=24)
        assert batch.turns >= 3


def test_every_word_is_one_token() -> None:
    tokenizer = words.tokenizer()
    text = " ".join(question for task in TASKS for question, _ in sample(task).turns)
    pieces = tokenizer.tokenize(text)
    assert len(pieces) == words.count(text.replace("?", " .").replace(",", " ."))
    assert tokenizer.decode(tokenizer(text + "\nünlike 4711").input_ids) == text + "\nünlike 4711"


def test_the_needle_frame_shows_its_border_and_its_glyph_as_drawn() -> None:
    plan = make_plan("v_niah", tokens=640, seed=8, split="test", turns=6)
    frames = sample("v_niah", seed=8, split="test").parts[0][1]
    stamps = plan.clips[0].stamps
    for question, glyph in plan.turns:
        colour = question.split()[6]
        value = torch.tensor(sprites.COLOUR_VALUES[colour], dtype=torch.uint8)
        shown = [t for t in range(len(frames)) if (frames[t, :, :4].permute(1, 2, 0) == value).all()]
        assert len(shown) == 2 and shown[0] % 2 == 0 and shown[1] == shown[0] + 1
        (box,) = [s[2:6] for s in stamps if s[0] == shown[0] and s[1] == sprites.NUMBER[glyph]]
        x, y, w, h = box
        crop = frames[shown[0], :, y : y + h, x : x + w]
        sprite = sprites.atlas("cpu")[sprites.NUMBER[glyph]]
        wanted = sprite[torch.arange(h) * sprites.SIDE // h][:, torch.arange(w) * sprites.SIDE // w]
        assert torch.equal((crop == 255).all(0), wanted == sprites.WHITE)


def test_shapes_are_as_many_as_the_answer_says_and_the_ball_ends_where_it_says() -> None:
    plan = make_plan("counting", tokens=2048, seed=1, split="train", turns=4)
    for question, answer in plan.turns:
        shape = sprites.NUMBER[question.split()[-1].rstrip("?")]
        assert len({s[0] // 2 for s in plan.clips[0].stamps if s[1] == shape}) == int(answer)
    made = sample("tracking", tokens=1024)
    frames = made.parts[0][1]
    for question, place in made.turns:
        value = torch.tensor(sprites.COLOUR_VALUES[question.split()[3]], dtype=torch.uint8)[None, :, None, None]
        last = (frames == value).all(1).flatten(1).sum(1) > 100
        ball = (frames[torch.where(last)[0][-1]] == value[0]).all(0).nonzero().float().mean(0)
        row, column = (ball / torch.tensor(frames.shape[2:]) * 3).long().tolist()
        assert words.PLACES[row * 3 + column] == place


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_the_answers_and_the_prompt_stops_before_the_first(task: str, encoder: Encoder) -> None:
    one = sample(task)
    full, prompt = encoder(one, answers=True), encoder(one, answers=False)
    labels = full["labels"][0]
    said = encoder.text.tokenizer.decode(labels[labels >= 0])
    assert said == "".join(f"{answer}<|im_end|>" for _, answer in one.turns)
    assert torch.equal(full["input_ids"][0][labels >= 0], labels[labels >= 0])
    length = prompt["input_ids"].shape[1]
    assert torch.equal(prompt["input_ids"], full["input_ids"][:, :length]) and labels[length] >= 0 > labels[length - 1]
    assert "labels" not in prompt


@pytest.mark.parametrize("task", ["v_niah", "mm_niah"])
def test_ids_positions_and_layout_agree_with_processor_sglang_and_layout_rule(
    task: str, encoder: Encoder, made: tuple[Path, Any]
) -> None:
    from sglang.srt.layers.rotary_embedding import MRotaryEmbedding
    from transformers import AutoProcessor

    one = sample(task, tokens=1500)
    got, config = encoder(one, answers=False), made[1].config
    ids = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    wanted, _ = MRotaryEmbedding.get_rope_index(
        spatial_merge_size=2, vision_start_token_id=config.vision_start_token_id, model_type="qwen2_5_vl",
        tokens_per_second=2, input_ids=got["input_ids"], image_grid_thw=got.get("image_grid_thw"),
        video_grid_thw=got["video_grid_thw"], second_per_grid_ts=got["second_per_grid_ts"], **ids,
    )  # fmt: skip
    assert torch.equal(got["position_ids"], wanted)
    layout = layout_from_processor(got, merge=2, **ids)
    assert len(layout.items) == sum(kind != "text" for kind, _ in one.parts) and layout.length == wanted.shape[-1]

    processor = AutoProcessor.from_pretrained(made[0])
    content = [{"type": kind, "text": part} for kind, part in one.parts] + [{"type": "text", "text": one.turns[0][0]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    media = {f"{name}s": [part for kind, part in one.parts if kind == name] or None for name in ("image", "video")}
    real = processor(text=[text], return_tensors="pt", **media)
    assert torch.equal(real["input_ids"], got["input_ids"])
    assert torch.equal(real["pixel_values_videos"], got["pixel_values_videos"])
    assert "pixel_values" not in got or torch.equal(real["pixel_values"], got["pixel_values"])


@pytest.mark.parametrize("task", ["caption", "mm_niah"])
def test_the_fast_forward_pass_equals_the_unmodified_model(task: str, made: tuple[Path, Any], encoder: Encoder) -> None:
    """Two prompts at once against one by one, windows of several lengths; fp32: only the order of sums differs."""
    fast = copy.deepcopy(made[1])
    use_fast_attention(fast)
    names = [model.model.visual.config._attn_implementation for model in (fast, made[1])]
    assert names[0] == ATTENTION != names[1]
    plans = [make_plan(task, tokens=640, seed=n, split="train", turns=3, shape_seed=2) for n in (3, 4)]
    batch = collate(plans, 640, encoder.text)
    assert any(side % 112 for grid in batch.grids for side in (grid[1] * 14, grid[2] * 14))
    tensors = batch.to_model(encoder, photographs=True)
    with torch.no_grad():
        got = answer_logits(fast, tensors)
        wanted = []
        for plan in plans:
            inputs = encoder(drawn(plan, "cpu"), answers=True)
            labels = inputs.pop("labels")[0]
            wanted.append(made[1](**inputs).logits[0, torch.where(labels >= 0)[0] - 1])
    reference = torch.cat(wanted)
    assert torch.allclose(
        got, reference, rtol=0, atol=64 * torch.finfo(torch.float32).eps * reference.abs().max().item()
    )
    assert exact(got, tensors, batch.turns).shape == (batch.turns,)


def test_segments_of_several_lengths_attend_only_to_themselves() -> None:
    """Against one masked attention over all; gradients too."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 5, 6, 11, 18, 19], dtype=torch.int32)
    number = torch.repeat_interleave(torch.arange(5), bounds.diff())
    mask = number[:, None] == number
    for cu, allowed in (
        (bounds, mask),
        (torch.tensor([0, 19], dtype=torch.int32), torch.ones(19, 19, dtype=torch.bool)),
    ):
        q, k, v = torch.randn(3, 1, 2, 19, 8, dtype=torch.float64, requires_grad=True)
        got, _ = segment_attention(None, q, k, v, None, scaling=0.3, cu_seq_lens_q=cu)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.3).transpose(1, 2)
        assert torch.allclose(got, wanted)
        weight = torch.randn_like(got)
        for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, wanted)), strict=True):
            assert torch.allclose(a, b)


def test_an_exported_folder_loads_with_the_auto_class_and_is_small(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    size = export(new_model(Sizes(), 0), tmp_path)
    assert size < 24 * 2**20
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["torch_dtype"] == "bfloat16"
    assert settings["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and type(loaded).__name__ == settings["architectures"][0]
    with pytest.raises(ValueError, match="parameters"):
        new_model(Sizes(layers=9), 0)


def test_evaluation_gives_a_share_of_right_answers(made: tuple[Path, Any], encoder: Encoder) -> None:
    assert 0 <= accuracy(load(made[0], "cpu"), encoder, "v_niah", 256, 0.5, 3) <= 1


def test_samples_of_a_test_differ_in_shape(
    made: tuple[Path, Any], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[Any, ...]] = []

    def noted(*given: Any, **options: Any) -> Batch:
        batch = batches.plan_batch(*given, **options)
        shapes.append((*batch.grids, len(batch.depths)))
        return batch

    for module in (evaluate, train):
        monkeypatch.setattr(module, "plan_batch", noted)
    model, config = load(made[0], "cpu"), replace(CONFIGS["smoke"], valid_lengths=(512,), valid_samples=8)
    assert 0 <= accuracy(model, encoder, "v_niah", 512, 0.5, 8) <= 1
    (row,) = train.validate(model, encoder, config, 512, 60.0)
    assert row["answers"] >= 8 and len(shapes) == 8  # two prompts a batch
    assert len(set(shapes[:4])) > 2 and len(set(shapes[4:])) > 2


def test_a_resumed_training_goes_on_as_an_unbroken_one(tmp_path: Path) -> None:
    config = replace(CONFIGS["smoke"], sizes=SMALL)
    rounds = Rounds(config, replace(config.stages["short"], micro_tokens=256, micros=1))

    def train(trainer: Trainer, numbers: range) -> None:
        update = Update(trainer)
        trainer.master.set_rate(1e-3)
        for number in numbers:
            batches = rounds[number]
            prompts = sum(len(batch.tensors["input_ids"]) for batch in batches)
            update(encode(trainer, batches, torch.arange(prompts)).step(0, prompts))
            trainer.progress.micro += 1
        assert update.sums[:, 3].sum() > 0

    unbroken = Trainer(tmp_path / "a", config, "cpu")
    train(unbroken, range(4))
    broken = Trainer(tmp_path / "b", config, "cpu")
    train(broken, range(2))
    broken.save()
    resumed = Trainer(tmp_path / "b", config, "cpu")
    assert resumed.progress == checkpoint.Progress(micro=2, stage="short")
    train(resumed, range(2, 4))
    for one, two in zip(unbroken.master.masters, resumed.master.masters, strict=True):
        assert torch.equal(one, two)
    resumed.save()
    elsewhere = Trainer(tmp_path / "c", config, "cpu", weights=tmp_path / "b" / "model")  # bf16, a new optimizer
    assert elsewhere.progress == resumed.progress
    stored = load(tmp_path / "b" / "model", "cpu").lm_head.weight
    assert torch.equal(stored, resumed.model.lm_head.weight.bfloat16().float())
    assert torch.equal(stored, elsewhere.model.lm_head.weight)


def test_a_run_goes_through_the_stages_and_trains_what_is_theirs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(look, "FITTED_ON", 2)
    monkeypatch.setattr(answers, "FLUSH_ROUNDS", 1)
    usual = CONFIGS["smoke"].stages["short"]
    stages = {"look": replace(usual, minutes=0.01, lengths={256: 1.0}, micros=1), "short": replace(usual, minutes=0.02)}
    # an hour, but what it reaches at once is enough
    stages["words"] = replace(usual, minutes=60, lengths={128: 1.0}, tasks={"codes": 1.0}, enough=0.0)
    stages["look and say"] = replace(stages["look"], near=1.0)
    stages = {name: stages[name] for name in ("look", "look and say", "words", "short")}
    tasks = {"v_niah": 1.0, "codes": 1.0}
    config = replace(
        CONFIGS["smoke"], sizes=SMALL, stages=stages, tasks=tasks, workers=0, valid_samples=1, valid_lengths=(64,)
    )
    trainer = Trainer(tmp_path, config, "cpu")

    def changed(trainer: Trainer, before: dict[str, torch.Tensor]) -> set[bool]:
        """Whether weights that are no longer as before are the vision tower's."""
        return {"visual" in name for name, w in trainer.model.named_parameters() if not torch.equal(w, before[name])}

    first = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    assert trainer.run(3.0)  # to the end of the last stage, which comes after seconds on a quiet machine
    assert trainer.progress.stage == "short" and changed(trainer, first) == {True, False}
    longer = stages | {"short": replace(stages["short"], minutes=1.0)}
    again = Trainer(tmp_path, replace(config, stages=longer), "cpu")
    before = {name: weight.detach().clone() for name, weight in again.model.named_parameters()}
    assert not changed(trainer, before) and not again.run(0.05) and changed(again, before) == {False}
    rows = [json.loads(line) for line in (tmp_path / "model" / "log.jsonl").read_text().splitlines()]
    assert {row.get("stage") for row in rows} >= {"look", "look and say", "words", "short"}


@pytest.mark.parametrize("task", ["mm_niah", "codes", "order", "caption"])
def test_answers_are_wanted_where_they_stand_and_at_the_words_they_are_asked_by(task: str) -> None:
    config = replace(CONFIGS["smoke"], turns=24)
    stage = replace(config.stages["short"], lengths={1024: 1.0}, micro_tokens=2048, micros=1, tasks={task: 1.0})
    (batch,) = Rounds(config, stage)[3]
    spelt = words.tokenizer().convert_ids_to_tokens
    hints = {False: 0, True: 0}
    for ids, *lists in zip(
        *(batch.tensors[name] for name in ("input_ids", "where", "goals", "first", "early", "second")), strict=True
    ):
        raw = spelt(ids.tolist())  # with the space before words of a question, which an answer lacks
        tokens = [token.removeprefix("Ġ") for token in raw]
        text = " ".join(token for token in tokens if "pad" not in token)
        for at, number, begins, early, second in zip(*(values.tolist() for values in lists), strict=True):
            if number < 0:  # nothing wanted
                continue
            word = spelt(number).removeprefix("Ġ")
            if tokens[at] in words.CODES and tokens[at + 1] == ".":
                assert f"The code of {word} is {tokens[at]} ." in text and early and second
            elif tokens[at] == "<|video_pad|>":
                assert early and second and word in words.COLOURS
            elif raw[at][0] == "Ġ" and tokens[at] in words.ASKED_BY:
                ends = (f"{tokens[at]} {rest}" for rest in ("? <|im_end|>", "border show ?", "frame ?", "one ?"))
                assert any(end in text for end in ends) and not early
                answer = tokens[tokens.index("assistant", at) + 2 + second]
                assert word == answer
                hints[second] += 1
            else:
                assert tokens[at + 1] == word and not early and not second
                assert begins == (tokens[at - 1] == "assistant")
    assert hints == {False: batch.turns, True: batch.turns}


@pytest.mark.parametrize("task", ["order", "v_niah"])
def test_frames_with_a_border_know_which_came_before(task: str) -> None:
    config = replace(CONFIGS["smoke"], turns=24)
    stage = replace(config.stages["short"], lengths={1024: 1.0}, micro_tokens=2048, micros=1, tasks={task: 1.0})
    (batch,) = Rounds(config, stage)[3]
    spelt = words.tokenizer().convert_ids_to_tokens
    for row, clip in enumerate(batch.clips[0]):
        start = int((batch.tensors["mm_token_type_ids"][row] > 0).int().argmax())
        size = clip.tokens // (clip.frames // 2)
        told: dict[int, set[str]] = {}
        for at, goal, mine in zip(*(batch.tensors[name][row].tolist() for name in ("where", "goals", "second")),
                                  strict=True):  # fmt: skip
            if mine and batch.tensors["mm_token_type_ids"][row, at] > 0:
                told.setdefault((at - start) // size, set()).add(spelt(goal).removeprefix("Ġ"))
        shown = sorted({(stamp[0] // 2, look.COLOUR_OF[(stamp[6], stamp[7], stamp[8])]) for stamp in clip.stamps
                        if stamp[1] == sprites.NUMBER["border"]})  # fmt: skip
        before = {pair: {colour for _, colour in shown[:number]} for number, (pair, _) in enumerate(shown) if number}
        assert told == before and len(before) >= 2


def test_shapes_know_how_many_came_with_them() -> None:
    config = replace(CONFIGS["smoke"], turns=24)
    stage = replace(config.stages["short"], lengths={1024: 1.0}, micro_tokens=2048, micros=1, tasks={"counting": 1.0})
    (batch,) = Rounds(config, stage)[3]
    spelt, most = words.tokenizer().convert_ids_to_tokens, set()
    for row, clip in enumerate(batch.clips[0]):
        start = int((batch.tensors["mm_token_type_ids"][row] > 0).int().argmax())
        told = {at - start: int(spelt(goal)) for at, goal, mine, early in zip(
            *(batch.tensors[name][row].tolist() for name in ("where", "goals", "second", "early")), strict=True,
        ) if mine and early}  # fmt: skip
        seen = torch.cat([look.labels(clip.pair(pair))["shape"] for pair in range(clip.grid[0])]).tolist()
        wanted, met = {}, [0] * len(words.SHAPES)
        for token, shape in enumerate(seen):
            if shape < len(words.SHAPES):
                met[shape] += 1
                wanted[token] = met[shape]
        assert told == wanted
        most |= set(met)
    assert max(most) > 2


def test_what_the_tower_is_taught_is_what_the_frames_show() -> None:
    for task in ("v_niah", "tracking", "caption", "counting"):
        plan = make_plan(task, tokens=4096, seed=3, split="train", turns=24)
        (clip,) = plan.clips
        seen = [look.labels(part) for part in look.marked_pairs(Batch(task, 0, {}, [[clip]], [], [], 0), Random(0))]
        for question, answer in plan.turns:
            if task == "v_niah":
                colour = next(n for n, c in enumerate(words.COLOURS) if c in question)
                assert {int(s["glyph"][0]) for s in seen if s["border"][0] == colour} == {words.GLYPHS.index(answer)}
            elif task == "tracking":
                colour = next(n for n, c in enumerate(words.COLOURS) if c in question)
                assert [s["cell"][0] for s in seen if s["ball"][0] == colour][-1] == words.PLACES.index(answer)
            elif task == "counting":
                shape = next(n for n, c in enumerate(words.SHAPES) if c in question)
                assert sum((s["shape"] == shape).sum() for s in seen) == int(answer)  # a token for each frame
            else:
                colour = next(n for n, c in enumerate(words.COLOURS) if f"{c} frame" in question)
                corner = next(c for c in words.CORNERS if c in question)
                (found,) = [s for s in seen if s["border"][0] == colour]
                there = found["corner"] == words.CORNERS.index(corner)
                said = zip(found["digit 0"][there].tolist(), found["digit 1"][there].tolist(), strict=True)
                assert set(said) == {(int(answer[0]), int(answer[1]))}
                assert bool(there.any()) and not there.all()


def test_tokens_are_nearer_to_what_they_are_to_say_once_fitted(tmp_path: Path, monkeypatch: Any) -> None:
    usual = CONFIGS["smoke"].stages["short"]
    stages = {"look": replace(usual, lengths={512: 1.0}, micro_tokens=2048, tasks={"v_niah": 1.0, "tracking": 1.0})}
    trainer = Trainer(tmp_path, replace(CONFIGS["smoke"], sizes=SMALL, stages=stages, workers=0), "cpu")
    number = trainer.encoder.text.tokenizer.convert_tokens_to_ids
    heads = look.Heads(trainer.model.get_input_embeddings().weight, number)

    last = trainer.model.model.visual.merger.mlp[-1]

    def distance() -> float:
        trainer.progress.micro = 0
        with torch.no_grad():
            tokens, found = next(look.frames(trainer, "look"))
            return float(look.apart(tokens, found, heads.said) / look.apart(0 * tokens, found, heads.said))

    monkeypatch.setattr(look, "FITTED_ON", 1)
    before = distance()
    trainer.progress.micro = 0
    look.fit(trainer, look.frames(trainer, "look"), heads)
    fitted, map_ = distance(), last.weight.detach().clone()
    assert fitted < 0.95 < before  # 1: of tokens that say nothing; this tower has learnt nothing
    for seed in range(4):  # no other map is nearer
        with torch.no_grad():
            noise = torch.randn(map_.shape, generator=torch.Generator().manual_seed(seed))
            last.weight.copy_(map_ + 0.1 * map_.std() * noise)
        assert distance() > fitted


@pytest.mark.parametrize("task", ["mm_niah", "caption", "counting", "codes"])
def test_a_perfect_tower_says_what_it_is_taught(task: str) -> None:
    text = Text(words.tokenizer())
    batch = plan_batch(text, task, 2048, 2, seed=3, split="train", turns=8)
    embeddings = torch.randn(len(text.tokenizer), 256, generator=torch.Generator().manual_seed(0))
    number = text.tokenizer.convert_tokens_to_ids
    tokens, fields = perfect.said(batch, embeddings, number), look.spoken(embeddings, number)
    vision = batch.tensors["mm_token_type_ids"] > 0
    assert not tokens[~vision].any() and (not batch.clips or tokens[vision].any(-1).all())
    for row, of_row in enumerate(zip(*batch.clips, strict=True)):
        every = torch.split(tokens[row, vision[row]], [clip.tokens for clip in of_row])
        for clip, own in zip(of_row, every, strict=True):
            for pair, part in enumerate(own.view(clip.grid[0], -1, own.shape[1])):
                for name, value in look.labels(clip.pair(pair)).items():
                    shown = value < len(fields[name])
                    assert torch.equal((part[shown] @ fields[name].T).argmax(1), value[shown]), (name, pair)


def test_wrong_arguments_are_named() -> None:
    usual: dict[str, Any] = {"task": "order", "tokens": 512, "seed": 0, "split": "test"}
    for wrong, name in (({"task": "sums"}, "task"), ({"split": "dev"}, "split"), ({"tokens": 10}, "tokens")):
        with pytest.raises(ValueError, match=name):
            make_sample(**usual | wrong)
    with pytest.raises(ValueError, match="depth"):
        make_sample("order", tokens=512, seed=0, split="test", depth=2.0)
