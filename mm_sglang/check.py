"""`mm-sglang check`: what this machine can run, and why not the rest. Reads only; starts nothing."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, entry_points, version

from mm_sglang.compat import SUPPORTED_SGLANG, require_supported_sglang
from mm_sglang.cpu.activate import NAME as CPU_PLATFORM
from mm_sglang.layout import KNOWN_ARCHITECTURES

Row = tuple[str, bool, str]
# Imported by SGLang on CUDA under `except ImportError`: absent is fine, one that does not load ends the server.
OPTIONAL = ("deep_gemm",)
NEEDED = ("sglang", "sglang command", "plugin", "device", *OPTIONAL)  # rows that decide whether a server can start


def checks() -> list[Row]:
    """(what, fine or not, detail) rows; those of NEEDED decide whether a server can start."""
    return [
        _sglang(),
        _command(),
        _plugin(),
        _device(),
        *_libraries(),
        *_engines(),
        _video(),
        ("layout rules", True, ", ".join(KNOWN_ARCHITECTURES)),
    ]


def print_check() -> int:
    """Print the table; 0 if a server can start here, 1 if not."""
    rows = checks()
    for name in ("mm-sglang", "sglang", "torch", "transformers", "triton", "flash-attn-4"):
        print(f"{name:14} {_version(name)}")
    print(f"{'python':14} {platform.python_version()} on {platform.machine()}\n")
    width = max(len(what) for what, _, _ in rows)
    for what, fine, detail in rows:
        print(f"{'yes' if fine else 'no ':3}  {what:{width}}  {detail}")
    needed = all(fine for what, fine, _ in rows if what in NEEDED)
    print(f"\nmm_sparse can {'' if needed else 'not '}be served on this machine.")
    return 0 if needed else 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _sglang() -> Row:
    try:
        return "sglang", True, f"{require_supported_sglang()} is a tested version"
    except (ValueError, PackageNotFoundError) as error:
        return "sglang", False, f"{error}; tested: {SUPPORTED_SGLANG}"


def _command() -> Row:
    from mm_sglang.serve import sglang_script

    try:
        return "sglang command", True, sglang_script()
    except ValueError as error:
        return "sglang command", False, str(error)


def _libraries() -> list[Row]:
    """Those of OPTIONAL that are installed but do not load."""
    rows: list[Row] = []
    for name in OPTIONAL:
        try:
            __import__(name)
        except ImportError:
            pass
        except Exception as error:  # whatever its loader raises
            rows.append((name, False, f"SGLang's server ends on it: {error}: needs another build of it, or none"))
    return rows


def _plugin() -> Row:
    names = {e.name for group in ("sglang.srt.plugins", "sglang.srt.platforms") for e in entry_points(group=group)}
    missing = {"mm_sglang", CPU_PLATFORM} - names
    if missing:
        return (
            "plugin",
            False,
            f"entry point {sorted(missing)[0]} is not registered: install the package, don't only import it",
        )
    return "plugin", True, "--attention-backend mm_sparse is registered with SGLang"


def _device() -> Row:
    import torch

    from mm_sglang.choice import CUDA_MAJORS

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()}, SM{major}{minor}"
        return "device", major in CUDA_MAJORS, name if major in CUDA_MAJORS else f"{name}: needs SM80 to SM90"
    return "device", True, f"cpu, {torch.get_num_threads()} threads, no GPU found"


def _engines() -> list[Row]:
    from mm_sglang.kernels.engines import ENGINES

    rows = []
    for engine in ENGINES.values():
        reason = engine.missing()
        rows.append((f"engine {engine.name}", reason is None, reason or engine.note))
    return rows


def _video() -> Row:
    for module in ("torchcodec", "decord"):  # SGLang's own order of preference
        try:
            __import__(module)
            return "mp4 decoder", True, f"{module}, which SGLang will use"
        except (ImportError, RuntimeError):
            continue
    return "mp4 decoder", False, "neither torchcodec nor decord imports: SGLang answers video requests with an error"
