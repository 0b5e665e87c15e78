"""--schema: a JSON schema that every answer has to fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Schema = dict[str, Any]


def read_schema(path: Path) -> Schema:
    """The schema in a file.

    Raises:
        ValueError: it is no JSON schema, or one that the grammar engine cannot follow.
    """
    import jsonschema

    try:
        schema = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"--schema {path}: needs a file that can be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"--schema {path}: not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"--schema {path}: needs a JSON object, got {type(schema).__name__}")
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"--schema {path}: not a JSON schema: {error.message} at {error.json_path}") from error
    _require_grammar(path, schema)
    return schema


def _require_grammar(path: Path, schema: Schema) -> None:
    """SGLang compiles it with xgrammar for every request; a schema that it refuses should not wait until then."""
    import xgrammar

    try:
        xgrammar.Grammar.from_json_schema(json.dumps(schema))
    except RuntimeError as error:
        said = str(error).strip().partition(": ")[2]  # after xgrammar's own file and line
        raise ValueError(f"--schema {path}: xgrammar cannot follow it: {said}") from error


def mismatch(schema: Schema, answer: str) -> str | None:
    """Why the answer does not fit (it may have run out of tokens); None if it does."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(answer), schema)
    except jsonschema.ValidationError as error:
        return f"{error.message} at {error.json_path}"
    except ValueError as error:
        return f"not JSON: {error}"
    return None
