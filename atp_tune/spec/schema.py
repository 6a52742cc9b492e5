"""The JSON schema of study files, by which editors complete keys and mark mistakes.

It is of draft 7, which the editors' TOML plugins read, and holds what `atp_tune.spec.studyfile` accepts, short forms
too. It does not hold rules between several keys.
"""

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from atp_tune.spec.config import dumps
from atp_tune.spec.study import Study

DRAFT = "http://json-schema.org/draft-07/schema#"


class TomlSchema(GenerateJsonSchema):
    """pydantic's schema for TOML, which has no null: tuples as in draft 7, no titles, which repeat the keys."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> dict[str, Any]:
        """The schema without null."""
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> dict[str, Any]:
        """The default, unless it is no value."""
        found = super().default_schema(schema)
        return {key: value for key, value in found.items() if key != "default" or value is not None}

    def tuple_schema(self, schema: core_schema.TupleSchema) -> dict[str, Any]:
        """`items` for `prefixItems`."""
        found = super().tuple_schema(schema)
        return {"items" if key == "prefixItems" else key: value for key, value in found.items()}

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No title."""
        return False


def schema_text() -> str:
    """The schema, as the text of a file."""
    return dumps(study_schema(), 2) + "\n"


def study_schema() -> dict[str, Any]:
    """The schema of study files."""
    return {"$schema": DRAFT, **Study.model_json_schema(schema_generator=TomlSchema)}


def choices() -> dict[str, list[str]]:
    """The dotted keys that hold more than a table, each with the values that it names: choices, else its default."""
    schema = study_schema()
    return {key: _named(_resolved(schema, value)) or _default(value) for key, value in _values(schema, schema)}


def _values(schema: dict[str, Any], table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in table["properties"].items():
        forms = _resolved(schema, value)
        if any("properties" not in form for form in forms):
            yield prefix + key, value
        for form in forms:
            if "properties" in form:
                yield from _values(schema, form, f"{prefix}{key}.")


def _named(forms: list[dict[str, Any]]) -> list[str]:
    names = [str(name) for form in forms for name in form.get("enum", [form["const"]] if "const" in form else [])]
    return names + ["true", "false"] * any(form.get("type") == "boolean" for form in forms)


def _default(value: dict[str, Any]) -> list[str]:
    default = value.get("default", "")
    return [] if default == "" or isinstance(default, list) else [str(default)]


def _resolved(schema: dict[str, Any], value: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms of a value, where they are defined."""
    forms = value.get("anyOf", [value])
    return [schema["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form for form in forms]
