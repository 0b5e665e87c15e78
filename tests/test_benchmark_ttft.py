"""benchmarks.ttft without a GPU: the model folder, the settings, the table of stored results."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.ttft import __main__ as ttft
from benchmarks.ttft import plots, profile
from benchmarks.ttft.child import Contestant, prompt, spread
from benchmarks.ttft.model import LAYERS, make_model
from benchmarks.ttft.parts import PARTS, VIDEO, settings, specs
from mm_sglang.config import AssumedVideo, SparseConfig
from mm_sglang.kernels import classes
from mm_sglang.kernels.patterns import BlockTopK, Grid, VerticalSlash
from mm_sglang.layout import assumed_video

STORED = RESULTS / "nvidia-h200" / "ttft.json"


def test_the_model_is_qwen_7bs_shape_with_other_layers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(make_model(tmp_path / "model", layers=3, positions=4096))
    text = config.text_config
    assert config.architectures == ["Qwen2_5_VLForConditionalGeneration"]
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads) == (
        3,
        3584,
        28,
        4,
    )
    assert text.head_dim * text.num_attention_heads == text.hidden_size and config.vision_config.out_hidden_size == 3584
    assert not list((tmp_path / "model").glob("*.safetensors"))


@pytest.mark.parametrize("kind, kinds", [("mix", {BlockTopK, VerticalSlash, Grid}), ("paper", {VerticalSlash, Grid})])
def test_the_settings_are_the_kernel_benchmarks_recipes(kind: str, kinds: set[type]) -> None:
    config = SparseConfig.from_mapping(settings(kind))
    config.check_model(layers=LAYERS, heads=28)
    for layer in (0, LAYERS - 1):
        patterns = config.patterns(layer, 28)
        assert patterns is not None and {type(p) for p in patterns} == kinds
        assert all(patterns[h] == patterns[h // 7 * 7] for h in range(28))  # a KV head's heads share a kind
    assert config.assume_video is not None and config.guard is None


def test_contestants_differ_in_the_backend_alone(tmp_path: Path) -> None:
    runs = specs(list(PARTS), 1 << 20, tmp_path, ["stock", "mm_sparse"])
    for part in ("whole", "ttft", "mixed"):
        stock, ours = (next(s for s in runs if (s["part"], s["name"]) == (part, who)) for who in ("stock", "mm_sparse"))
        assert stock["lengths"] == ours["lengths"] and stock.get("mixed") == ours.get("mixed")
        a, b = stock["arguments"], ours["arguments"]
        assert {key for key in {*a, *b} if a.get(key) != b.get(key)} == {
            "prefill_attention_backend", "decode_attention_backend", "attention_backend", "json_model_override_args",
        }  # fmt: skip
        assert a.get("enable_mixed_chunk", False) == (part == "mixed")
        layers = json.loads(b["json_model_override_args"])["mm_sparse"]["layers"]
        assert len(layers) == ours["layers"] == (LAYERS if part == "whole" else 4)
    assert len({s["chunk"] for s in runs if s["part"] == "chunks"}) == 5
    assert prompt(50, 1) == prompt(50, 1) != prompt(50, 2)


@pytest.mark.parametrize("kind", ["defaults", "probe"])
def test_other_settings_are_valid(kind: str) -> None:
    config = SparseConfig.from_mapping(settings(kind))
    config.check_model(layers=LAYERS, heads=28)
    assert config.assume_video is not None


def test_questions_follow_a_whole_video(tmp_path: Path) -> None:
    """What comes after the assumed videos' tokens is text, so that it is a question to mm_sparse."""
    for spec in specs(["question"], 1 << 20, tmp_path, ["stock", "mm_sparse"]):
        assert not spec["arguments"]["disable_radix_cache"] and len(spec["questions"]["tokens"]) == 3
        for tokens in spec["questions"]["tokens"]:
            layout = assumed_video(AssumedVideo(**VIDEO), tokens + spec["questions"]["more"], "cpu")
            assert classes.tail(layout, layout.length, 128) == spec["questions"]["more"]
            assert layout.length <= spec["arguments"]["context_length"]


def test_questions_about_a_cached_video_share_its_tokens(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    class Engine:
        def generate(self, input_ids: list[int], sampling_params: object) -> None:
            asked.append(input_ids)

    contestant = Contestant.__new__(Contestant)
    contestant.engine, contestant.name, contestant.out = Engine(), "ours", tmp_path / "out.json"
    contestant.record = {}
    assert contestant.questions(1000, 64) >= 0
    (found,) = json.loads(contestant.out.read_text())["questions"]
    assert {"video", "with_question", "cached_video"} < set(found) and len(found["all"]) == 6
    assert [len(ids) for ids in asked] == [1000] * 2 + [1064] * 8
    assert asked[0] != asked[1] and asked[2][:1000] != asked[3][:1000]  # each of a prefix that nobody has seen
    assert all(ids[:1000] == asked[3][:1000] for ids in asked[4:])
    assert len({tuple(ids[1000:]) for ids in asked[3:]}) == 7  # another question each time


def test_the_stored_table_shows_the_ratio_to_stock_at_its_best_chunk() -> None:
    record = json.loads(STORED.read_text())
    runs = [run for run in record["runs"] if run["part"] == "ttft"]
    seconds = {run["name"]: {t["tokens"]: t["seconds"] for t in run["ttft"]} for run in runs}
    ratio = seconds["stock"][1 << 20] / seconds["mm_sparse"][1 << 20]
    text = ttft.table(record)
    row = next(line for line in text[text.index("ttft: ") :].splitlines() if "1024K" in line and "mm_sparse" in line)
    assert f"{ratio:.2f}x" in row


def test_the_picture_is_of_what_the_record_holds(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    record = json.loads(STORED.read_text())
    for number, (part, drawn) in enumerate((("ttft", True), ("chunks", True), ("mixed", False))):
        path = tmp_path / f"{number}.png"
        plots.plot({"runs": [run for run in record["runs"] if run["part"] == part]}, path)
        assert path.exists() == drawn
    assert not [warning for warning in recwarn if "legend" in str(warning.message)]


def test_a_profile_sorts_kernels_into_stages_and_counts_idle_time_once(tmp_path: Path) -> None:
    def event(ts: float, dur: float, name: str, cat: str = "kernel") -> dict[str, object]:
        return {"ph": "X", "cat": cat, "ts": ts, "dur": dur, "name": name}

    events = [
        event(0, 100, "nvjet_tst_128x256"), event(50, 100, "_mass"), event(200, 300, "kernel_cutlass_FlashAttention90"),
        event(500, 10, "Memcpy DtoD", "gpu_memcpy"), event(510, 490, "kernel_flashinfernorm"),
        event(0, 9e9, "cpu", "cpu_op"),
    ]  # fmt: skip
    with gzip.open(tmp_path / "1-TP-0.trace.json.gz", "wt") as stream:
        json.dump({"traceEvents": events}, stream)
    found = profile.read(tmp_path, 2)
    assert found["seconds"] == pytest.approx(1e-3) and found["idle"] == pytest.approx(50e-6)
    assert found["waits"] == [pytest.approx((150e-6, 50e-6, "_mass", "kernel_cutlass_FlashAttention90"))]
    assert found["exposed_exchange"] == 0 and len(found["ranks"]) == 1
    assert [row[3] for row in found["timeline"]] == ["attention", "copies", "norm, rotary, activation"]
    assert found["timeline"][0] == ("", 0.0, 0.3, "attention")
    assert found["launches"] == 5 and found["stages"] == pytest.approx(
        {"linear layers": 100e-6, "estimate": 100e-6, "attention": 300e-6, "copies": 10e-6,
         "norm, rotary, activation": 490e-6}
    )  # fmt: skip
    events += [event(1000, 40, "ncclDevKernel_AllGather"), event(1020, 10, "_mass")]
    assert profile.by_stage(events)["exposed_exchange"] == pytest.approx(30e-6)
    with pytest.raises(ValueError, match="no kernel"):
        profile.by_stage([event(0, 9, "cpu", "cpu_op")])


def test_the_stages_know_every_kernel_of_ours() -> None:
    for folder, stages in {
        "estimate": {"estimate"}, "select": {"select"}, "tiles": {"plan"}, "permute": {"permute (copies of q, k, v)"},
    }.items():  # fmt: skip
        names: set[str] = set()
        for file in (Path(ttft.__file__).parents[2] / "kernels" / folder).glob("*.py"):
            names |= set(re.findall(r"(\w+)\[\(?[^=\n]*\]\(", file.read_text()))
        launched = {name for name in names if name.startswith("_")}
        assert launched and {profile.stage_of(name) for name in launched} == stages, launched


def test_percentiles_of_gaps() -> None:
    found = spread([n / 1000 for n in range(1, 1001)])
    assert (found["gaps"], found["p50"], found["p99"], found["longest"]) == (1000, 501, 991, 1000)
