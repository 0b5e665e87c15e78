"""Settings files that a command makes: one form, and never half a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


class _Plain(yaml.SafeDumper):
    """YAML that a person can edit: equal recipes are written out, not referred to."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def settings_of(layers: Mapping[int, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """SparseConfig's mapping for heads that are all named in `layers`."""
    return {
        "min_tokens": 4096,
        "default": {"pattern": "vertical_slash", "columns": 1000, "slashes": 4096},
        "layers": dict(layers),
        "provenance": dict(provenance),
    }


def write_settings(out: Path, content: Mapping[str, Any]) -> None:
    """YAML for --sparse-config."""
    write_whole(out, yaml.dump(dict(content), Dumper=_Plain, sort_keys=False, width=120))


def write_whole(out: Path, text: str) -> None:
    """All of it or, if interrupted, what was there before."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(out.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, out)
