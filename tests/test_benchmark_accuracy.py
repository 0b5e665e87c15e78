"""benchmarks.accuracy on a tiny random model: methods, densities, dense answer rows, going on, report, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import ceiling, searching
from benchmarks.accuracy import session as sessions
from benchmarks.accuracy.ceiling import ceilings
from benchmarks.accuracy.methods import (
    FILES,
    METHODS,
    NO_TAIL,
    RIVALS,
    SEARCHED,
    WITH_TAIL,
    Layer,
    balance,
    rival,
    searched,
    tail_of,
)
from benchmarks.accuracy.patterns import Fixed, Strided, TriShape
from benchmarks.accuracy.report import heat_maps, shared, table
from benchmarks.accuracy.student import Prompt, Student
from benchmarks.tiny_model.config import Sizes
from benchmarks.tiny_model.inputs import Encoder
from benchmarks.tiny_model.model import export, new_model
from benchmarks.tiny_model.tasks import TASKS, make_sample
from mm_sglang.config import SparseConfig
from mm_sglang.kernels import inspection
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import attended, recall
from mm_sglang.kernels.layout import VIDEO, TokenLayout, consume_grids
from mm_sglang.kernels.ops import reference_ops
from mm_sglang.kernels.patterns import AShape, BlockTopK, HeadPattern
from mm_sglang.kernels.patterns.block_topk import SCORES
from mm_sglang.kernels.plan import TILE
from mm_sglang.kernels.prefill import make_plan, sparse_prefill
from mm_sglang.search import bounded

HEADS = 4


@pytest.fixture(autouse=True)
def one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records tell commits apart, and somebody may commit while tests run."""
    monkeypatch.setenv("MM_SGLANG_COMMIT", "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = Sizes(
        heads=HEADS, kv_heads=2, layers=2, intermediate=128, vision_hidden=64, vision_heads=2, vision_depth=2,
        vision_intermediate=64, vision_full=(1,),
    )  # fmt: skip
    made = tmp_path_factory.mktemp("accuracy") / "model"
    export(new_model(sizes, 0), made)
    return made


@pytest.fixture(scope="module")
def student(folder: Path) -> Student:
    return Student(str(folder), "cpu")


@pytest.fixture(scope="module")
def prompt(folder: Path, student: Student) -> Prompt:
    sample = make_sample("mm_niah", tokens=1200, seed=3, split="test", depth=0.5)
    return student.prepare(Encoder(folder, "cpu")(sample, answers=True))


def layer_of(q: torch.Tensor, k: torch.Tensor, layout: TokenLayout) -> Layer:
    return Layer(number=0, q=q, k=k, layout=layout, scale=0.25, ops=reference_ops())


def noise(tokens: int) -> tuple[torch.Tensor, torch.Tensor, TokenLayout]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(tokens, HEADS, 16, generator=generator), torch.randn(tokens, 2, 16, generator=generator)
    items = tuple(consume_grids(VIDEO, [(40, 8, 12)], [(30, 990)], 2))
    return q, k, TokenLayout(items=items, length=tokens)


def test_prepared_embeddings_give_what_transformers_gives(
    folder: Path, student: Student, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_sample("mm_niah", tokens=1200, seed=3, split="test", depth=0.5)
    inputs = Encoder(folder, "cpu")(sample, answers=True)
    with monkeypatch.context() as patch:  # as past 65,536 patches: the tower's frames in slices
        patch.setattr(bounded, "PATCHES", 300)
        sliced = student.prepare(inputs).inputs["inputs_embeds"]
    assert sum(len(inputs[name]) for name in ("pixel_values", "pixel_values_videos")) > 600
    torch.testing.assert_close(sliced, prompt.inputs["inputs_embeds"], rtol=1e-4, atol=1e-5)
    length = len(prompt.answer) + prompt.layout.length
    labels = inputs.pop("labels")[0]
    assert prompt.layout.items and labels[prompt.layout.length :][: len(prompt.answer)].equal(prompt.answer)
    with torch.no_grad():
        whole = student.held.model(**inputs, use_cache=False).logits[0, prompt.layout.length - 1 : length - 1]
    assert student.run(prompt, None).tokens == whole.argmax(1).tolist()


@pytest.mark.parametrize("name", [*RIVALS, "searched"])
def test_every_method_is_dense_with_all_budgets(student: Student, prompt: Prompt, name: str) -> None:
    config = SparseConfig.from_mapping({"default": {"pattern": "vertical_slash", "boundary": "2d"}})
    make = searched(config, HEADS) if name == "searched" else rival(name, HEADS)
    outcome = student.run(prompt, lambda layer, *_: make(layer, 256.0))
    assert outcome.density >= 1.0  # tri-shape computes its last rows twice, tiles cut by a boundary count both times
    assert outcome.error < 1e-5 and outcome.recall > 0.9999
    assert outcome.tokens == student.run(prompt, None).tokens


@pytest.mark.parametrize(("with_tail", "without"), [("searched", NO_TAIL), (WITH_TAIL, "xattention")])
def test_some_methods_keep_the_questions_rows_dense(
    student: Student, prompt: Prompt, with_tail: str, without: str
) -> None:
    make = rival("xattention", HEADS)
    longer, own = (
        student.run(prompt, lambda layer, *_: make(layer, 2.0**-8), tail_of(m)) for m in (with_tail, without)
    )
    assert longer.density > own.density and longer.recall > own.recall


@pytest.mark.parametrize("name", RIVALS)
def test_budgets_come_near_the_density_from_below(name: str) -> None:
    layer, make = layer_of(*noise(4096)), rival(name, HEADS)
    found = layer.density(make(0, balance(make, [layer], 0.5)))
    assert 0.4 < found <= 0.5
    assert layer.density(make(0, 2.0**-8)) < 0.3


def pairs(pattern: HeadPattern, tokens: int = 1000) -> torch.Tensor:
    """Bool [tokens, tokens] that head 0 attends."""
    q, k, layout = noise(tokens)
    return attended(
        make_plan(q, k, layout=layout, patterns=[pattern] * HEADS, scale=0.25, ops=reference_ops()), 0
    )  # fmt: skip


def test_the_sparse_transformers_patterns_hold_what_they_promise() -> None:
    row, stride = 900, 24  # 4 x 6 tokens a frame
    kept = pairs(Fixed(columns=1000 // stride + 1))[row]
    assert kept[stride - 1 :: stride][: row // stride].all() and kept[row - stride + 1 : row + 1].all()
    assert not pairs(Fixed(columns=2))[row, 30:500].all()
    kept = pairs(Strided(diagonals=1000))[row]
    assert kept[row % stride : row + 1 : stride].all() and kept[row - stride + 1 : row + 1].all()
    few = pairs(Strided(diagonals=2), 2000)[1900]  # of 83 diagonals every 42nd
    assert few[1900 - 42 * stride] and not few[1900 - 21 * stride]


def test_tri_shape_has_dense_last_rows() -> None:
    kept = pairs(TriShape(local=64, last=100))
    assert kept[900:].sum(1).tolist() == list(range(901, 1001)) and kept[800].sum() < 500


def test_answer_rows_are_dense_and_the_prompts_are_not(student: Student, prompt: Prompt) -> None:
    """With one layer's output in hand: rows from the answer on equal dense attention's, the prompt's differ."""
    seen: dict[str, torch.Tensor] = {}
    real = student.held.run

    def spy(inputs: Any, look: Any) -> torch.Tensor:
        def twice(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
            out: torch.Tensor = look(layer, q, k, v, scale)
            if layer == 0:
                bq, bk, bv = (x.transpose(0, 1)[None] for x in (q, k, v))
                dense = torch.nn.functional.scaled_dot_product_attention(
                    bq, bk, bv, is_causal=True, scale=scale, enable_gqa=True
                )
                seen.update(out=out, dense=dense[0].transpose(0, 1))
            return out

        return real(inputs, twice)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student.held, "run", spy)
        outcome = student.run(prompt, lambda *_: (AShape(sink=1, local=1),) * HEADS)
    length = prompt.layout.length
    torch.testing.assert_close(seen["out"][length:], seen["dense"][length:], rtol=1e-4, atol=1e-5)
    assert (seen["out"][length - 1] - seen["dense"][length - 1]).abs().max() > 1e-3
    assert outcome.density < 0.6 and 0 < outcome.recall < 1 and outcome.error > 0


def run(folder: Path, out: Path, *extra: str) -> int:
    arguments = [str(folder), "--lengths", "1200", "--depths", "0.5", "--samples", "1", "--density", "0.5"]
    return accuracy.main([*arguments, "--out", str(out), *extra])


def test_a_run_goes_on_where_it_was(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ("--methods", *SEARCHED, "auto", "a_shape")
    assert run(folder, tmp_path, "--tasks", "v_niah", "order", "--budget-seconds", "0", *methods) == 0
    assert "Left out, as the time was over (2 cells): v_niah 1200 0.5" in capsys.readouterr().out
    assert run(folder, tmp_path, "--tasks", "v_niah", *methods) == 0
    stored = json.loads((tmp_path / "accuracy.json").read_text())
    assert {cell["method"] for cell in stored["cells"]} == {"dense", *SEARCHED, "auto", "a_shape"}
    assert not stored["left_out"] and set(stored["factors"]) == {f"{m} v_niah 1200" for m in (*SEARCHED, "a_shape")}
    assert set(stored["searched"]) == {f"{name}-1200.yaml" for name in FILES} and len(stored["commands"]) == 2
    assert stored["commands"][1].startswith("python -m benchmarks.accuracy ") and "--samples 1" in stored["commands"][1]
    for name in FILES:
        families = SparseConfig.from_yaml(tmp_path / f"{name}-1200.yaml").provenance["families"]
        assert any("grid" in f for f in families) is (name != "searched_no_grid")
        assert any(f.startswith("2d") for f in families) is (name != "searched_no_boundary")
    ran: list[Any] = []
    monkeypatch.setattr(sessions.Session, "_cell", lambda self, *given: ran.append(given))
    monkeypatch.setattr(sessions.Session, "_search", lambda self, _: None)
    run(folder, tmp_path, "--tasks", "v_niah", "order", *methods)
    assert [(length, task) for length, task, *_ in ran] == [(1200, "order")]
    run(folder, tmp_path, "--tasks", "v_niah", *methods, "fixed")
    assert ran[1:] == [(1200, "v_niah", 0.5, ("fixed",))]
    with pytest.raises(SystemExit):
        run(folder, tmp_path, "--tasks", "v_niah", "--density", "0.3")
    assert "is of a run with another density" in capsys.readouterr().err


def test_searched_patterns_do_not_depend_on_the_tasks_and_are_shared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task a process: the second takes what the first has searched, and the records become one."""
    first, second, held = (tmp_path / name for name in ("a", "b", "held"))
    shared_too = ("--searched", str(held), "--methods", "searched")
    assert run(folder, first, "--tasks", "order", *shared_too) == 0
    told = SparseConfig.from_yaml(held / "searched-1200.yaml").provenance
    assert [name.split()[0] for name in told["videos"]] == list(TASKS)
    (held / "searched_no_grid-1200.yaml").unlink()  # not needed for what follows

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(searching, "search_prompts", never)
    assert run(folder, second, "--tasks", "counting", *shared_too, "auto") == 0
    capsys.readouterr()
    assert accuracy.main(["--merge", str(first), str(second), "--out", str(tmp_path / "all")]) == 0
    said = capsys.readouterr().out
    assert "Not every method has every cell" in said and "accuracy-counting.png" in said
    record = json.loads((tmp_path / "all" / "accuracy.json").read_text())
    assert {(cell["task"], cell["method"]) for cell in record["cells"]} == {
        *(("order", method) for method in ("dense", "searched")),
        *(("counting", method) for method in ("dense", "searched", "auto")),
    }
    assert len(record["commands"]) == 2 and (tmp_path / "all" / "searched-1200.yaml").is_file()
    other = json.loads((second / "accuracy.json").read_text())
    (second / "accuracy.json").write_text(json.dumps(other | {"searched": {"searched-1200.yaml": "another"}}))
    with pytest.raises(SystemExit):
        accuracy.main(["--merge", str(first), str(second), "--out", str(tmp_path / "never")])
    assert "another searched-1200.yaml than" in capsys.readouterr().err


def test_a_search_ends_with_the_time_and_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = sessions.Session._in_time, [0]

    def fifth(self: sessions.Session, needed: float) -> None:
        calls[0] += 1
        if calls[0] == 5:  # in the third prompt's first layer
            raise sessions.OutOfTime
        real(self, needed)

    monkeypatch.setattr(sessions.Session, "_in_time", fifth)
    assert run(folder, tmp_path, "--tasks", "v_niah", "--methods", "searched") == 0
    assert "Left out, as the time was over (1 cells): v_niah 1200 0.5" in capsys.readouterr().out
    done = json.loads((tmp_path / "searched-1200.yaml.partial").read_text())["done"]
    assert done == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert run(folder, tmp_path, "--tasks", "v_niah", "--methods", "searched") == 0
    assert not list(tmp_path.glob("*.partial")) and (tmp_path / "searched-1200.yaml").is_file()


def test_one_process_searches_and_the_others_wait(tmp_path: Path) -> None:
    def over() -> None:
        raise sessions.OutOfTime

    with searching.alone(tmp_path, over), pytest.raises(sessions.OutOfTime), searching.alone(tmp_path, over):
        raise AssertionError
    with searching.alone(tmp_path, over):  # free again
        assert not list(tmp_path.iterdir())


def test_a_length_is_served_by_the_nearest_search() -> None:
    assert searching.searched_at([4096, 16384, 65536, 131072]) == [1 << 15, 1 << 17]
    assert searching.searched_at([1 << 18]) == [1 << 17] and searching.searched_at([4096, 16384]) == [16384]
    assert searching.serving(1 << 18, (1 << 15, 1 << 17)) == 1 << 17


def test_means_are_over_the_cells_that_every_method_has() -> None:
    cells = [{"task": "order", "length": n, "depth": 0.5, "method": m} for n in (4096, 8192) for m in ("dense", "auto")]
    assert shared(cells) == cells and shared(cells[:3]) == cells[:2]


def test_the_table_and_the_heat_maps(tmp_path: Path) -> None:
    cells = [
        {"task": task, "length": length, "depth": depth, "method": method, "samples": 2, "agreement": 1.0,
         "correct": 0.5 if method == "auto" else 1.0, "recall": 0.9, "error": 0.1, "density": 0.1}
        for task in ("v_niah", "order") for length in (4096, 16384) for depth in (0.1, 0.9) for method in METHODS
    ]  # fmt: skip
    what = {"model": "m", "model_hash": "h", "density": 0.1}
    record = {"about": {"gpu": "none", "searched": "x"}, "what": what, "cells": cells, "left_out": ["order 65536 0.5"]}
    text = table(record)
    assert text.splitlines()[0] == "m (h), 16 test prompts, on none" and "order 65536 0.5" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("auto"))
    assert row == ["auto", *["50.0%", "/10.0"] * 3] and all(method in text for method in METHODS)
    made = heat_maps(record, tmp_path)
    assert [path.name for path in made] == ["accuracy-v_niah.png", "accuracy-order.png"]
    assert all(path.stat().st_size > 5000 for path in made)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "needs MODEL_FOLDER"),
        (("nowhere",), "nowhere: no model folder"),
        (("MODEL", "--density", "1.5"), "--density 1.5: needs a share"),
        (("MODEL", "--depths", "2"), "--depths [2.0]: needs shares from 0 to 1"),
        (("MODEL", "--methods", "magic"), "invalid choice: 'magic'"),
        (("MODEL", "--samples", "0"), "--samples 0: needs at least 1"),
        (("MODEL", "--lengths", "100"), "--lengths 100: needs at least 256 tokens"),
        (("MODEL", "--config", "x.yaml", "--methods", "searched_no_grid"), "need no --config"),
        (("--show", "missing.json"), "missing.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        accuracy.main([str(folder) if a == "MODEL" else a for a in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said and len(said.splitlines()) == 1


def test_no_recipe_holds_more_than_the_ceiling_and_the_heaviest_tiles_hold_just_it() -> None:
    length, density, scale = 1500, 0.3, 0.6
    q, k = torch.randn(length, HEADS, 16), torch.randn(length, 2, 16)
    found = ceilings(q, k, scale, density, tiles=1000)
    layout, number = TokenLayout(items=(), length=length), -(-length // TILE)
    for pattern in (BlockTopK(blocks=4, sink=0, local=128), AShape(sink=128, local=300)):
        _, lse, plan = sparse_prefill(
            q, k, k, layout=layout, patterns=[pattern] * HEADS, scale=scale, engine=engine("reference")
        )
        exact = reference_ops().row_lse(q, k, None, torch.arange(length, dtype=torch.int32), 0, scale)
        own = ceilings(q, k, scale, inspection.density(plan) + 1e-9, tiles=1000)
        assert recall(lse.T, exact).mean() <= own["tiles"] + 1e-6 < 1
        assert max(own[name] for name in SCORES) <= own["equal"] + 1e-6 <= own["tiles"] + 2e-6
    logits = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * scale
    weight = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(2)
    padded = torch.nn.functional.pad(weight, (0, -length % TILE, 0, -length % TILE))
    mass = padded.view(HEADS, number, TILE, number, TILE).sum((2, 4))
    causal = mass[:, torch.ones(number, number).tril().bool()].flatten().sort(descending=True).values
    assert found["tiles"] == pytest.approx(
        float(causal[: int(density * len(causal))].sum()) / (HEADS * length), rel=1e-5
    )
    best = [weight[:, n, : n + 1].topk(math.ceil((n + 1) * density - 1e-9), dim=1).values.sum() for n in range(length)]
    assert found["keys"] == pytest.approx(float(sum(best)) / (HEADS * length), rel=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_what_a_score_holds_is_what_block_topk_holds(score: str) -> None:
    length, scale = 1500, 0.6
    q, k = torch.randn(length, HEADS, 16), torch.randn(length, 2, 16)
    layout = TokenLayout(items=(), length=length)
    pattern = BlockTopK(blocks=5, sink=ceiling.SINK * TILE, local=ceiling.LOCAL * TILE, score=score)
    _, lse, plan = sparse_prefill(
        q, k, k, layout=layout, patterns=[pattern] * HEADS, scale=scale, engine=engine("reference")
    )
    exact = reference_ops().row_lse(q, k, None, torch.arange(length, dtype=torch.int32), 0, scale)
    found = ceilings(q, k, scale, inspection.density(plan), tiles=1000)
    assert found[score] == pytest.approx(float(recall(lse.T, exact).mean()), rel=1e-4)


def test_ceiling_writes_a_row_a_prompt_and_refuses_bad_input(folder: Path, tmp_path: Path) -> None:
    given = [str(folder), "--lengths", "1000", "--tasks", "v_niah", "--out", str(tmp_path / "c.json")]
    assert ceiling.main(given) == 0
    (row,) = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert 0.1 < row["clusters"] <= row["equal"] <= row["tiles"] < row["keys"] < 1 and len(row["layers"]) == 2
    for bad, named in ((["--density", "0"], "--density 0"), (["--lengths", "8"], "--lengths 8")):
        with pytest.raises(SystemExit) as stopped:
            ceiling.main([*given, *bad])
        assert stopped.value.code == 2, named
    with pytest.raises(SystemExit):
        ceiling.main([str(tmp_path)])
