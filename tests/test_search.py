"""The offline search on a tiny model and a real mp4: what it chooses, how it is taken up again, what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_sglang.cli import main
from mm_sglang.config import TEXT_TAIL, SparseConfig
from mm_sglang.demo.tiny_model import make_tiny_model
from mm_sglang.demo.video import render_video
from mm_sglang.kernels.engines import engine
from mm_sglang.kernels.inspection import density
from mm_sglang.kernels.layout import TokenLayout
from mm_sglang.kernels.ops import reference_ops
from mm_sglang.kernels.patterns import HeadPattern, head_pattern
from mm_sglang.kernels.plan import Plan
from mm_sglang.kernels.prefill import make_plan
from mm_sglang.long_video import video_limits
from mm_sglang.search import run
from mm_sglang.search.candidates import FAMILIES, at_density, density_by_head
from mm_sglang.search.capture import Captured
from mm_sglang.search.maps import layer_maps, maps_file, read_maps, shown_heads
from mm_sglang.search.scores import Scores, choose, too_dear
from mm_sglang.search.settle import balanced
from mm_sglang.search.videos import LEAST_TOKENS, content_of
from mm_sglang.serve import server_command

DENSITY = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("search")
    make_tiny_model(made / "model", layers=2)
    render_video(made / "a.mp4", seconds=20.0, width=224, height=224, seed=5)
    render_video(made / "short.mp4", seconds=2.0, width=56, height=56, seed=6)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Path:
    out = folder / "x.yaml"
    arguments = ["--videos", str(folder / "a.mp4"), "--out", str(out), "--density", str(DENSITY)]
    assert main(["search", str(folder / "model"), *arguments]) == 0
    return out


def test_the_result_is_loaded_by_a_server_of_that_model_only(folder: Path, found: Path) -> None:
    config = SparseConfig.from_yaml(found)
    config.check_model(layers=2, heads=8)
    assert set(config.layers) == {0, 1} and all(len(entry.heads) == 8 for entry in config.layers.values())
    server_command(str(folder / "model"), config=str(found), extra=[], cores=1)
    other = make_tiny_model(folder / "other", layers=2, max_positions=4096)
    with pytest.raises(ValueError, match="searched for model 'model' .*: needs a search of its own"):
        server_command(str(other), config=str(found), extra=[], cores=1)
    assert not list(folder.glob("*.partial")) and not list(folder.glob("*.tmp"))


def test_it_says_what_each_choice_gave(found: Path) -> None:
    told = SparseConfig.from_yaml(found).provenance
    assert told["tokens"][0] > LEAST_TOKENS and told["videos"] == [f"a.mp4 {content_of(found.with_name('a.mp4'))}"]
    assert told["budgets"].startswith("of a.mp4 ") and told["text_tail"] == TEXT_TAIL
    for heads in told["heads"].values():
        for head in heads.values():
            assert head["family"] in FAMILIES and 0 <= head["error"] < 1.5 and 0 < head["recall"] <= 1
        assert sum(head["density"] for head in heads.values()) / len(heads) <= DENSITY + 1e-4  # the choice itself


def test_maps_are_of_the_heads_that_the_report_shows(found: Path) -> None:
    told = SparseConfig.from_yaml(found).provenance["heads"]
    _, _, maps = read_maps(maps_file(found))
    assert set(maps) == set(shown_heads(told)) and 0 < len(maps) <= 2 * len(FAMILIES)
    assert main(["report", str(found)]) == 0


def test_families_are_brought_to_the_target() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2048, 4, 16, generator=generator), torch.randn(2048, 2, 16, generator=generator)
    layout, ops = TokenLayout(items=(), length=2048), reference_ops()

    def planned(pattern: HeadPattern) -> Plan:
        return make_plan(q, k, layout=layout, patterns=[pattern] * 4, scale=0.25, ops=ops)

    for family in ("vertical_slash", "block_topk", "columns"):
        pattern = at_density(family, 0.5, q, k, layout, 0.25, ops)
        plan = planned(pattern)
        assert 0.3 < density(plan) <= 0.5, family
        assert density(planned(pattern.scaled(2.0))) > 0.5
        each = density_by_head(plan)
        assert sum(each) / 4 == pytest.approx(density(plan))


def cell(*errors: float, cost: float = 0.1) -> dict[str, Any]:
    """Two samples: the second has other budgets."""
    recipe = head_pattern(FAMILIES["a_shape"])
    recipes = [recipe.to_dict(), recipe.scaled(2.0).to_dict()]
    return {"sums": [[2 * e * e, 2 * cost] for e in errors], "recipes": recipes}


def test_the_least_error_wins_among_those_that_keep_to_the_cost() -> None:
    cells = {"0": {"a_shape": cell(0.5, 0.1), "vertical_slash": cell(0.2, 0.3), "grid row": cell(0.0, 0.0, cost=0.3)}}
    assert [family for family, _ in choose(cells, 2, 0.1, 0)[0]] == ["vertical_slash", "a_shape"]
    dear = {"0": {"a_shape": cell(0.5, 0.1, cost=0.4), "grid row": cell(0.0, 0.0, cost=0.3)}}
    assert choose(dear, 2, 0.1, 0)[0][0][0] == "grid row"
    assert too_dear(cells, 0.1) == ["grid row"] and too_dear(dear, 0.1) == ["a_shape"] and not too_dear(cells, 0.3)


def test_a_prompt_of_large_outputs_counts_as_much_as_any_other(tmp_path: Path) -> None:
    """Two prompts, the same but for the values of the second: each says the same of the families."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(700, heads, 16, generator=generator) for heads in (4, 2, 2))
    layout = TokenLayout(items=(), length=700)
    cells = [
        run.layer_scores(q, k, own, 0.5, layout, 0.5, engine("reference"), ["a_shape", "block_topk"])[0]
        for own in (v, 1000 * v)
    ]
    for family, heads in cells[0].items():
        assert torch.tensor(heads).allclose(torch.tensor(cells[1][family]), rtol=1e-4)
        assert all(0 < error < 1 for error, _ in heads)


def test_budgets_are_those_of_the_longest_sample(tmp_path: Path) -> None:
    scores = Scores(tmp_path / "x.partial", {})
    for sample, tokens in enumerate((4000, 9000, 2000)):
        scores.begin(sample, tokens)
    assert scores.longest == 1
    local = [choose({"0": {"a_shape": cell(0.5)}}, 1, 0.1, sample)[0][0][1]["local"] for sample in (0, 1)]
    assert local[1] == 2 * local[0]


def test_a_layers_choice_is_brought_to_the_density() -> None:
    """Each recipe alone keeps to it, and a head that computes more takes them past it together."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(4096, 4, 16, generator=generator), torch.randn(4096, 2, 16, generator=generator)
    layout, made = TokenLayout(items=(), length=4096), engine("reference")

    def cost(recipes: list[HeadPattern]) -> float:
        ops = reference_ops()
        return density(make_plan(q, k, layout=layout, patterns=recipes, scale=0.25, ops=ops, tail=TEXT_TAIL))

    recipes = [head_pattern({"pattern": "a_shape", "sink": 128, "local": n}) for n in (2000, 1200, 1000, 800)]
    aim = 0.8 * cost(recipes)
    kept = balanced(recipes, aim, q, k, layout, 0.25, made)
    assert 0.85 * aim < cost(kept) <= aim
    budgets = [recipe.to_dict()["local"] for recipe in kept]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] < 2000


def test_an_interrupted_search_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = folder / "y.yaml", run.layer_scores
    calls: list[int] = []

    def once(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(run, "layer_scores", once)
    search = partial(
        run.search, str(folder / "model"), [folder / "a.mp4"], out, device="cpu", families=("a_shape", "columns")
    )
    with pytest.raises(KeyboardInterrupt):
        search(target=DENSITY)
    begun = folder / "y.yaml.partial"
    assert not out.exists() and json.loads(begun.read_text())["done"] == [[0, 0]]
    with pytest.raises(ValueError, match="is of another search"):
        search(target=0.2)
    search(target=DENSITY)
    assert len(calls) == 3 and out.exists() and not begun.exists()


def test_an_interruption_at_the_maps_leaves_no_stale_ones(
    folder: Path, found: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = folder / "again.yaml", layer_maps
    maps_file(out).write_bytes(maps_file(found).read_bytes())  # of an earlier search

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    search = partial(
        run.search, str(folder / "model"), [folder / "a.mp4"], out, target=DENSITY, device="cpu", families=("a_shape",)
    )
    monkeypatch.setattr(run, "layer_maps", stopped)
    with pytest.raises(KeyboardInterrupt):
        search()
    assert not maps_file(out).exists() and out.with_name("again.yaml.partial").exists()
    monkeypatch.setattr(run, "layer_maps", real)
    monkeypatch.setattr(run, "layer_scores", stopped)  # all scores are kept
    search()
    assert set(read_maps(maps_file(out))[2]) == set(shown_heads(SparseConfig.from_yaml(out).provenance["heads"]))
    assert not list(folder.glob("again*.partial")) and not list(folder.glob("again*.tmp"))


def test_videos_are_told_apart_by_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("one", 7), ("two", 8)):
        (folder / name).mkdir()
        render_video(folder / name / "clip.mp4", seconds=8.0, width=224, height=224, seed=seed)
    both = [folder / name / "clip.mp4" for name in ("one", "two")]
    search = partial(run.search, str(folder / "model"), target=DENSITY, device="cpu", families=("a_shape",))
    told = search(both, folder / "both.yaml")["provenance"]
    assert len(told["videos"]) == len(told["tokens"]) == 2
    with pytest.raises(ValueError, match="are the same: needs each once"):
        search([both[0], both[0]], folder / "never.yaml")

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "settle", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(both[:1], folder / "clip.yaml")
    with pytest.raises(ValueError, match="is of another search"):  # of a video of the same name
        search(both[1:], folder / "clip.yaml")


def test_max_video_tokens_are_the_servers_limits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Captured.prompt
    given: list[Any] = []

    def noted(held: Captured, video: Path, limits: Any) -> Any:
        given.append(limits)
        return real(held, video, limits)

    monkeypatch.setattr(Captured, "prompt", noted)
    search = partial(
        run.search, str(folder / "model"), [folder / "a.mp4"], target=DENSITY, device="cpu", families=("a_shape",)
    )
    usual = search(folder / "usual.yaml")["provenance"]
    cut = search(folder / "cut.yaml", max_video_tokens=2048)["provenance"]
    assert usual["limits"] == {} and cut["limits"] == given[-1]
    assert given[-1] == video_limits(2048, 28) and given[-1]["total_pixels"] == 2048 * 28 * 28
    assert cut["tokens"][0] < usual["tokens"][0]


@pytest.mark.parametrize(
    "video, density_given, message",
    [
        ("missing.mp4", "0.1", "missing.mp4: no such file"),
        ("short.mp4", "0.1", "short.mp4: gives 288 tokens: needs at least 1024"),
        ("model/config.json", "0.1", "no video that can be decoded"),
        ("a.mp4", "1.5", "--density 1.5: needs a share between 0 and 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, video: str, density_given: str, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before a model is loaded, also if the first video is good."""
    monkeypatch.setattr(run, "Captured", None)
    out = folder / "never.yaml"
    arguments = ["--videos", str(folder / "a.mp4"), str(folder / video), "--out", str(out), "--density", density_given]
    assert main(["search", str(folder / "model"), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and not out.exists() and len(said.splitlines()) == 1


def test_prepared_prompts_and_some_families(folder: Path) -> None:
    """Embeddings made beforehand give what the video gave; each file holds only what it was allowed."""
    held, out, fewer = Captured(str(folder / "model"), "cpu"), folder / "z.yaml", folder / "fewer.yaml"
    inputs, layout = held.prompt(folder / "a.mp4", {})
    model = held.model.model
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        seen = torch.cat(
            model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]).pooler_output
        )
        embeds = embeds.masked_scatter((inputs["input_ids"] == held.config.video_token_id)[..., None], seen)
    positions = inputs["position_ids"]
    prepared = {"inputs_embeds": embeds, "position_ids": positions}
    seen_by: list[torch.Tensor] = []
    for given in (inputs, prepared):
        seen_by.append(held.run(given, lambda *_: None))
    torch.testing.assert_close(*seen_by)
    families = ("a_shape", "columns", "grid row")
    told = run.search_prompts(
        held, {"mine": lambda: (prepared, layout)}, out, target=DENSITY, families=families,
        fewer={fewer: ["a_shape", "columns"]},
    )["provenance"]  # fmt: skip
    assert told["families"] == list(families) and told["videos"] == ["mine"] and told["tokens"] == [layout.length]
    for path, allowed in ((out, set(families)), (fewer, {"a_shape", "columns"})):
        heads = SparseConfig.from_yaml(path).provenance["heads"]
        assert {cell["family"] for layer in heads.values() for cell in layer.values()} <= allowed


def test_positions_are_the_servers_after_a_long_video(folder: Path) -> None:
    """200 frames of 6 x 6 tokens, a second each: the last one is at 2 * 199, and text goes on behind it."""
    held = Captured(str(folder / "model"), "cpu")
    config = held.config
    ids = [1, config.vision_start_token_id, *[config.video_token_id] * (200 * 36), 5, 6]
    inputs = {"input_ids": torch.tensor([ids]), "video_grid_thw": torch.tensor([[200, 12, 12]])}
    positions = held._served_positions(inputs | {"second_per_grid_ts": torch.tensor([1.0])})
    assert positions.shape == (3, 1, len(ids)) and positions[:, 0, -2].tolist() == [2 + 2 * 199 + 1] * 3


def test_an_unknown_family_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--videos",
        str(folder / "a.mp4"),
        "--out",
        str(folder / "never.yaml"),
        "--families",
        "a_shape",
        "magic",
    ]
    assert main(["search", str(folder / "model"), *arguments]) == 2
    assert "--families 'magic': needs some of ('a_shape'," in capsys.readouterr().err


def test_an_unknown_architecture_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = folder / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    arguments = ["--videos", str(folder / "a.mp4"), "--out", str(folder / "never.yaml")]
    assert main(["search", str(other), *arguments]) == 2
    assert "no token layout rule for architecture ['LlamaForCausalLM']" in capsys.readouterr().err


def test_a_missing_model_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--videos", str(folder / "a.mp4"), "--out", str(folder / "never.yaml")]
    assert main(["search", "/nope", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mm-sglang search: model /nope: ") and len(said.splitlines()) == 1
