"""What is no JSON schema is refused before anything starts; answers are held to the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_sglang.jobs.schema import mismatch, read_schema

SCHEMA = (
    '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}'
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "needs a JSON object, got list"),
        ('{"type": "strin"}', "not a JSON schema: 'strin' is not valid"),
        ('{"properties": {"a": {"minimum": "x"}}}', "not a JSON schema: 'x' is not of type 'number'"),
        (
            '{"type": "object", "properties": {"a": {"$ref": "#/no"}}}',
            "xgrammar cannot follow it: Cannot find field no",
        ),
    ],
)
def test_a_file_that_is_no_schema(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as refused:
        read_schema(path)
    assert str(path) in str(refused.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a file that can be read"):
        read_schema(tmp_path / "gone.json")


def test_answers(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA)
    schema = read_schema(path)
    assert mismatch(schema, '{"n": 3}') is None
    assert "is not of type 'integer' at $.n" in (mismatch(schema, '{"n": "3"}') or "")
    assert "not JSON" in (mismatch(schema, '{"n": ') or "")
