"""The command `mm-sglang`: what it runs, and one clear line and exit code 2 for bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mm_sglang.cli import main
from mm_sglang.serve import server_command, thread_binding


def model_folder(folder: Path, architecture: str = "Qwen2_5_VLForConditionalGeneration", nested: bool = True) -> Path:
    """A model folder as far as the checks before a start read it."""
    text = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    values = {"architectures": [architecture]} | ({"text_config": text} if nested else text)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"mm-sglang {arguments[0]}: ")
    return said


def test_serve_runs_sglangs_own_command_with_what_a_cpu_needs(tmp_path: Path) -> None:
    model = str(model_folder(tmp_path, nested=False))  # older Qwen2.5-VL folders have no text_config
    command, environment = server_command(
        model, config=None, extra=["--port", "1", "--mem-fraction-static=0.7"], cores=2
    )
    assert Path(command[0]).name == "sglang" and command[1:3] == ["serve", model]
    options = " ".join(command[3:])
    assert "--attention-backend mm_sparse" in options and "--device cpu" in options
    assert options.endswith("--port 1 --mem-fraction-static=0.7") and options.count("--mem-fraction-static") == 1
    assert environment == {"SGLANG_PLATFORM": "mm_sglang_cpu"}


def test_a_config_file_travels_as_an_absolute_path_beside_other_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_folder(tmp_path))
    Path("x.yaml").write_text("default: {pattern: grid}")
    command, _ = server_command(
        ".", config="x.yaml", extra=["--json-model-override-args", '{"rope": 1}', "--port", "1"], cores=2
    )
    assert json.loads(command[command.index("--json-model-override-args") + 1]) == {
        "rope": 1,
        "mm_sparse": str(tmp_path / "x.yaml"),
    }
    assert command.count("--json-model-override-args") == 1 and '{"rope": 1}' not in command


def test_tensor_parallel_ranks_get_their_own_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    model = str(model_folder(tmp_path))
    assert (
        server_command(model, config=None, extra=["--tp", "2"], cores=8)[1]["SGLANG_CPU_OMP_THREADS_BIND"] == "0-3|4-7"
    )
    assert thread_binding(2, 2) == "0|1"
    with pytest.raises(ValueError, match="4 ranks: needs at least as many CPU cores, this machine has 2"):
        thread_binding(4, 2)


def test_a_gpu_server_keeps_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enabled, where = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    for name in (enabled, where):
        monkeypatch.delenv(name, raising=False)
    model, own = str(model_folder(tmp_path)), tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(own))
    assert enabled not in server_command(model, config=None, extra=[], cores=2)[1]  # a CPU has none
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    _, environment = server_command(model, config=None, extra=[], cores=2)
    assert environment == {enabled: "1", where: str(own / "mm_sglang" / "flash_attention")}
    assert Path(environment[where]).is_dir()
    assert server_command(model, config=None, extra=[], cores=None)[1] == {}  # of another machine nothing is known
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "config.json"))  # a file
    (tmp_path / "config.json").touch()
    assert server_command(model, config=None, extra=[], cores=2)[1] == {}
    assert "kernels are compiled again at every start" in capsys.readouterr().out
    monkeypatch.setenv("XDG_CACHE_HOME", str(own))
    monkeypatch.setenv(enabled, "0")
    assert server_command(model, config=None, extra=[], cores=2)[1] == {}


def test_context_parallel_sets_what_sglang_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_CPU_OMP_THREADS_BIND", raising=False)
    model = str(model_folder(tmp_path))
    command, environment = server_command(model, config=None, extra=[], cores=2, context_parallel=2)
    wanted = "--tp-size 2 --attn-cp-size 2 --enable-prefill-cp --mm-enable-dp-encoder --cp-strategy interleave"
    assert wanted in " ".join(command) and environment["SGLANG_CPU_OMP_THREADS_BIND"] == "0|1"
    zigzag = ["--cp-strategy", "zigzag"]
    command, _ = server_command(model, config=None, extra=zigzag, cores=2, context_parallel=2)
    assert command.count("--cp-strategy") == 1 and "interleave" not in command
    command, _ = server_command(model, config=None, extra=[], cores=2, context_parallel=1)
    assert "--attn-cp-size" not in command


@pytest.mark.parametrize(
    "architecture, extra, message",
    [
        ("LlamaForCausalLM", [], "no token layout rule for architecture"),
        (None, ["--json-model-override-args", "{"], "not JSON"),
        (None, ["--json-model-override-args", "[]"], "needs a JSON object"),
        (None, ["--json-model-override-args", '{"mm_sparse": {"default": {"pattern": "zigzag"}}}'], "pattern='zigzag'"),
        (None, ["--json-model-override-args", '{"mm_sparse": "gone.yaml"}'], "config gone.yaml"),
        (
            None,
            ["--json-model-override-args", '{"mm_sparse": {"default": {"pattern": "grid"}, "layers": {"4": {}}}}'],
            "layer 4: the model has layers 0..3",
        ),
        (
            None,
            [
                "--json-model-override-args",
                '{"mm_sparse": {"default": {"pattern": "grid"}, '
                '"layers": {"0": {"heads": {"8": {"pattern": "dense"}}}}}}',
            ],
            "head 8: the model has query heads 0..7",
        ),
        (
            None,
            ["--sparse-config", "x.yaml", "--json-model-override-args", '{"mm_sparse": "y.yaml"}'],
            "needs one of them",
        ),
        (None, ["--attention-backend", "fa3"], "--attention-backend fa3: nothing would be sparse"),
        (None, ["--prefill-attention-backend=fa3"], "--prefill-attention-backend fa3: nothing would be sparse"),
        (None, ["--max-video-tokens", "4096", "--chunked-prefill-size", "8K"], "--chunked-prefill-size 8K: needs a"),
        (None, ["--tp", "many"], "--tp many: needs a whole number"),
        (None, ["--context-parallel", "0"], "--context-parallel 0: needs a whole number from 1"),
        (None, ["--context-parallel", "2", "--tp", "2"], "--context-parallel 2 and --tp: needs one of them"),
        (None, ["--context-parallel", "3"], "over 3 CPU ranks: needs a divisor of the model's 2 KV heads"),
        (None, ["--tp", "3", "--attn-cp-size", "2"], "--attn-cp-size 2 of --tp-size 3: needs the same size"),
    ],
)
def test_serve_refuses_before_it_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, architecture: str | None, extra: list[str], message: str
) -> None:
    model = model_folder(tmp_path, architecture or "Qwen3VLForConditionalGeneration")
    assert message in refused(capsys, "serve", str(model), "--device", "cpu", *extra)


def test_a_folder_that_is_no_model_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "has no config.json" in refused(capsys, "serve", str(tmp_path), "--device", "cpu")


def test_demo_refuses_a_video_that_is_no_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "needs an mp4 file" in refused(capsys, "demo", "--video", str(tmp_path / "gone.mp4"), "--out", str(tmp_path))


def test_demo_refuses_a_video_without_a_question(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.mp4").touch()
    assert "needs --question" in refused(capsys, "demo", "--video", str(tmp_path / "mine.mp4"), "--out", str(tmp_path))


def test_unknown_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--fast"])
    assert stopped.value.code == 2 and "unrecognized arguments: --fast" in capsys.readouterr().err


def test_the_model_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--port", "1", "model"])
    assert stopped.value.code == 2 and "MODEL comes first" in capsys.readouterr().err


def test_check_tells_of_a_library_that_would_end_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SGLang does without deep_gemm, but not with one whose shared library does not load."""
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # as if it were not installed
    assert main(["check"]) == 0 and "deep_gemm" not in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "deep_gemm")
    (tmp_path / "deep_gemm.py").write_text("raise OSError('Could not load this library: _C.so')")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check"]) == 1
    shown = capsys.readouterr().out
    assert "Could not load this library: _C.so" in shown and "can not be served" in shown


def test_check_names_engines_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check"])
    said = capsys.readouterr().out
    assert "engine reference" in said and "layout rules" in said and "0.5.23 is a tested version" in said
    assert code == (0 if "mm_sparse can be served" in said else 1)
