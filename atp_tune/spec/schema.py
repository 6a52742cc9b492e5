"""The JSON schema of study files, by which editors complete keys and mark mistakes.

It is of draft 7, which the editors' TOML plugins read, and holds what `atp_tune.spec.studyfile` accepts: short forms
and former names of keys too, which are marked as deprecated. It does not hold rules between several keys.
"""

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from atp_tune.spec.config import dumps
from atp_tune.spec.former import KEYS
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
    found = Study.model_json_schema(schema_generator=TomlSchema)
    for former, present in KEYS.items():
        *tables, old = former.split(".")
        *_, new = present.split(".")
        for table in _tables(found, tables):
            _add(table, old, new)
    return {"$schema": DRAFT, **found}


def choices() -> dict[str, list[str]]:
    """The dotted keys that hold more than a table, each with the values that it names: choices, else its default."""
    schema = study_schema()
    return {key: _named(_resolved(schema, value)) or _default(value) for key, value in _values(schema, schema)}


def _values(schema: dict[str, Any], table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in table["properties"].items():
        forms = _resolved(schema, value)
        if not value.get("deprecated") and any("properties" not in form for form in forms):
            yield prefix + key, value
        for form in forms:
            if "properties" in form and not value.get("deprecated"):
                yield from _values(schema, form, f"{prefix}{key}.")


def _named(forms: list[dict[str, Any]]) -> list[str]:
    present = [form for form in forms if not form.get("deprecated")]
    names = [str(name) for form in present for name in form.get("enum", [form["const"]] if "const" in form else [])]
    return names + ["true", "false"] * any(form.get("type") == "boolean" for form in forms)


def _default(value: dict[str, Any]) -> list[str]:
    default = value.get("default", "")
    return [] if default == "" or isinstance(default, list) else [str(default)]


def _tables(schema: dict[str, Any], path: list[str]) -> list[dict[str, Any]]:
    """The schemas of the table at a dotted key: several, if it has short forms."""
    tables = [schema]
    for key in path:
        inner = [_resolved(schema, table["properties"][key]) for table in tables if key in table["properties"]]
        tables = [form for forms in inner for form in forms if "properties" in form]
    return tables


def _resolved(schema: dict[str, Any], value: dict[str, Any]) -> list[dict[str, Any]]:
    """The forms of a value, where they are defined."""
    forms = value.get("anyOf", [value])
    return [schema["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form for form in forms]


def _add(table: dict[str, Any], old: str, new: str) -> None:
    """Adds a former name of a key; a key that is needed may have either."""
    table["properties"].setdefault(
        old, {**table["properties"][new], "description": f"is called {new} now", "deprecated": True}
    )
    if new in table.get("required", []):
        table["required"].remove(new)
        table.setdefault("allOf", []).append({"anyOf": [{"required": [new]}, {"required": [old]}]})
