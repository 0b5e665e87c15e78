"""Hooks into SGLang that are not public interfaces, one file each; docs/compat.md is their table."""

from __future__ import annotations

from importlib.metadata import version

SUPPORTED_SGLANG = ("0.5.23",)


def require_supported_sglang() -> str:
    """The installed version of SGLang, or ValueError if it is not one that the hooks and tests were run with."""
    found = version("sglang")
    if found not in SUPPORTED_SGLANG:
        raise ValueError(
            f"sglang {found}: mm_sglang needs one of {SUPPORTED_SGLANG} (its hooks are tested for these only)"
        )
    return found


def mm_sparse_prefills() -> bool:
    """Whether this process's server was started with --attention-backend mm_sparse."""
    from sglang.srt.runtime_context import attention_backends

    from mm_sglang.plugin import BACKEND

    return bool(attention_backends()[0] == BACKEND)
