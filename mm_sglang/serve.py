"""`mm-sglang serve`: the `sglang serve` command that mm_sparse needs on this machine, checked before it is run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_sglang.compat import require_supported_sglang
from mm_sglang.config import SparseConfig
from mm_sglang.cpu.activate import NAME as CPU_PLATFORM
from mm_sglang.layout import require_known_architecture
from mm_sglang.long_video import long_video
from mm_sglang.model_hash import require_same_model
from mm_sglang.parallel.heads import local_heads
from mm_sglang.plugin import BACKEND

OVERRIDES = "--json-model-override-args"
# What a plain CPU needs; a flag the user gives wins. The pool and the request slots are sized for a workstation.
CPU_FLAGS: dict[str, str | None] = {
    "--device": "cpu",
    "--mm-attention-backend": "sdpa",
    "--mem-fraction-static": "0.2",
    "--max-running-requests": "16",
    "--sleep-on-idle": None,  # an idle scheduler polls at full speed otherwise
}


def run_server(
    model: str,
    *,
    config: str | None,
    extra: Sequence[str],
    max_video_tokens: int | None = None,
    context_parallel: int | None = None,
) -> int:
    """Check, print the command, become it. Raises ValueError for what can be known to be wrong before the start."""
    require_supported_sglang()
    refuse_other_backends(extra)
    command, environment = server_command(
        model, config=config, extra=extra, cores=os.cpu_count() or 1, max_video_tokens=max_video_tokens,
        context_parallel=context_parallel, check_room=True,
    )  # fmt: skip
    shown = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    print(" ".join([*shown, *map(shlex.quote, command)]), flush=True)
    os.execve(command[0], command, os.environ | environment)


def refuse_other_backends(extra: Sequence[str]) -> None:
    """ValueError for options by which a server would run without mm_sparse, as nobody asks for by name."""
    for name in ("--attention-backend", "--prefill-attention-backend"):
        given = flag_value(extra, name) or BACKEND
        if given != BACKEND:
            raise ValueError(f"{name} {given}: nothing would be sparse: needs `sglang serve` for that")


def server_command(
    model: str,
    *,
    config: str | None,
    extra: Sequence[str],
    cores: int | None,
    max_video_tokens: int | None = None,
    context_parallel: int | None = None,
    check_room: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """The server's argv and the environment variables it needs: on the GPU if there is one, else on the CPU.

    Args:
        cores: of this machine, for CPU ranks; None: the server will run on another one, so nothing of this one counts.
        check_room: this process becomes the server, so `max_video_tokens` have to fit into what its GPU has free, not
            into what it has.

    Raises:
        ValueError: settings that are wrong, or that don't fit a model folder that is here to be read.
    """
    import torch

    extra, overrides = _without_overrides(extra)
    if config is not None:
        if "mm_sparse" in overrides:
            raise ValueError(f"--sparse-config and an mm_sparse section in {OVERRIDES}: needs one of them")
        overrides["mm_sparse"] = str(Path(config).resolve())
    settings = SparseConfig.from_settings(overrides.get("mm_sparse"))
    model_config = _read_model_config(model)
    if model_config is not None:
        _check_model(model, model_config, settings)

    environment: dict[str, str] = {}
    flags: dict[str, str | None] = {"--attention-backend": BACKEND}
    if context_parallel is not None:
        extra = [*_context_parallel(context_parallel, extra), *extra]
    ranks, spread = _ranks(extra), _whole(extra, CONTEXT_PARALLEL)
    if spread > 1 and ranks != spread:
        raise ValueError(f"--attn-cp-size {spread} of --tp-size {ranks}: needs the same size, which counts all ranks")
    if spread == 1 and model_config is not None:
        local_heads(_text_config(model_config)["num_attention_heads"], 0, ranks)
    if not torch.cuda.is_available() or flag_value(extra, "--device") == "cpu":
        environment["SGLANG_PLATFORM"] = CPU_PLATFORM
        if spread > 1 and model_config is not None and cores is not None:
            _check_kv_heads(model_config, spread)
        if ranks > 1 and cores is not None and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
            environment["SGLANG_CPU_OMP_THREADS_BIND"] = thread_binding(ranks, cores)
        flags |= CPU_FLAGS
    elif cores is not None:
        environment |= kernel_cache()
    if max_video_tokens is not None:
        chunk, fraction = _number(extra, "--chunked-prefill-size", int), _number(extra, "--mem-fraction-static", float)
        lifted = long_video(
            model, max_video_tokens, ranks=ranks // spread, spread=spread, chunk=chunk, fraction=fraction,
            cache_mb=int(os.environ["SGLANG_VLM_CACHE_SIZE_MB"]) if "SGLANG_VLM_CACHE_SIZE_MB" in os.environ else None,
            free=None if cores is None or environment.get("SGLANG_PLATFORM") == CPU_PLATFORM else _memory(check_room),
        )  # fmt: skip
        print(f"mm-sglang: {lifted.needs}", flush=True)
        flags |= lifted.flags
        environment |= {name: value for name, value in lifted.environment.items() if name not in os.environ}
    added = [part for name, value in flags.items() if flag_value(extra, name) is None for part in (name, value) if part]
    if overrides:
        added += [OVERRIDES, json.dumps(overrides)]
    return [sglang_script(), "serve", model, *added, *extra], environment


def kernel_cache() -> dict[str, str]:
    """What makes FlashAttention-4 keep its kernels on disk (flash_attn/cute/cache_utils.py), unless the user says else.

    It is off by itself, and a server's first long prompts wait for seconds. In this user's own cache, not below /tmp as
    theirs, where another user's file could be loaded.
    """
    enabled, where = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
    if enabled in os.environ or where in os.environ:
        return {}
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm_sglang" / "flash_attention"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"mm-sglang: kernels are compiled again at every start: {error}", flush=True)
        return {}
    return {enabled: "1", where: str(folder)}


def _memory(check_room: bool) -> int:
    """Bytes of this machine's GPU: free ones, or all of them, which to ask takes up none in this process."""
    import torch

    free = torch.cuda.mem_get_info()[0] if check_room else torch.cuda.get_device_properties(0).total_memory
    return int(free)


def sglang_script() -> str:
    """SGLang's own command: the one of this interpreter's environment, else the one on PATH."""
    beside = Path(sys.executable).with_name("sglang")
    found = str(beside) if beside.is_file() else shutil.which("sglang")
    if found is None:
        raise ValueError(f"no command `sglang` beside {sys.executable} or on PATH: needs sglang installed")
    return found


def _read_model_config(model: str) -> Mapping[str, Any] | None:
    """The folder's config.json; None for a name that is no folder here, which is left to SGLang to fetch."""
    path = Path(model) / "config.json"
    if not Path(model).is_dir():
        return None
    if not path.is_file():
        raise ValueError(f"model {model}: the folder has no config.json")
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _text_config(values: Mapping[str, Any]) -> Mapping[str, Any]:
    text: Mapping[str, Any] = values.get("text_config", values)  # older Qwen2.5-VL folders keep them at the top
    return text


def _check_model(model: str, values: Mapping[str, Any], settings: SparseConfig) -> None:
    """ValueError if the folder's architecture has no layout rule, or the settings name layers or heads it lacks.

    The backend makes the same checks when it starts.
    """
    require_known_architecture(values.get("architectures"))
    text = _text_config(values)
    settings.check_model(layers=text["num_hidden_layers"], heads=text["num_attention_heads"])
    require_same_model(settings, model)


def _check_kv_heads(values: Mapping[str, Any], size: int) -> None:
    """On a CPU SGLang pads KV heads that --tp-size doesn't divide; weights of whole heads don't fit those."""
    heads = _text_config(values)["num_key_value_heads"]
    if heads % size:
        raise ValueError(f"context parallelism over {size} CPU ranks: needs a divisor of the model's {heads} KV heads")


def thread_binding(ranks: int, cores: int) -> str:
    """SGLANG_CPU_OMP_THREADS_BIND for `ranks` processes: equal runs of cores, "0-3|4-7"."""
    if ranks > cores:
        raise ValueError(f"a model over {ranks} ranks: needs at least as many CPU cores, this machine has {cores}")
    share = cores // ranks
    runs = [(rank * share, (rank + 1) * share - 1) for rank in range(ranks)]
    return "|".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """Value of `--name value` or `--name=value`, the last one given; None if it is not there."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == name:
            found = arguments[index + 1] if index + 1 < len(arguments) else ""
        elif argument.startswith(name + "="):
            found = argument[len(name) + 1 :]
    return found


TENSOR_PARALLEL = ("--tp", "--tp-size", "--tensor-parallel-size")
CONTEXT_PARALLEL = ("--attn-cp-size", "--attention-context-parallel-size")


def _ranks(arguments: Sequence[str]) -> int:
    return _whole(arguments, TENSOR_PARALLEL)


def _whole(arguments: Sequence[str], names: Sequence[str]) -> int:
    """The number given under one of an option's names, 1 if none is."""
    for name in names:
        value = flag_value(arguments, name)
        if value is not None:
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"{name} {value}: needs a whole number from 1")
            return int(value)
    return 1


def _number(arguments: Sequence[str], name: str, kind: type[Any]) -> Any:
    """The number given as an option, None if none is."""
    value = flag_value(arguments, name)
    try:
        return None if value is None else kind(value)
    except ValueError as error:
        raise ValueError(f"{name} {value}: needs a number") from error


def _context_parallel(size: int, extra: Sequence[str]) -> list[str]:
    """SGLang's options for prefills over `size` ranks; its --tp-size counts all ranks and splits nothing here."""
    if size < 1:
        raise ValueError(f"--context-parallel {size}: needs a whole number from 1")
    for name in (*TENSOR_PARALLEL, *CONTEXT_PARALLEL):
        if flag_value(extra, name) is not None:
            raise ValueError(f"--context-parallel {size} and {name}: needs one of them, it sets the other")
    if size == 1:
        return []
    flags = {"--tp-size": str(size), "--attn-cp-size": str(size), "--enable-prefill-cp": None}
    flags |= {"--mm-enable-dp-encoder": None}  # whole vision weights on every rank, which encodes its share of frames
    flags |= {"--cp-strategy": "interleave", "--cuda-graph-backend-prefill": "disabled"}  # captured, but never replayed
    return [part for name, value in flags.items() if flag_value(extra, name) is None for part in (name, value) if part]


def _without_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without --json-model-override-args, and that option's content."""
    text = flag_value(arguments, OVERRIDES)
    if text is None:
        return list(arguments), {}
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{OVERRIDES} {text!r}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{OVERRIDES} {text!r}: needs a JSON object")
    rest, skip = [], False
    for argument in arguments:
        if skip or argument == OVERRIDES:
            skip = not skip
        elif not argument.startswith(OVERRIDES + "="):
            rest.append(argument)
    return rest, content
