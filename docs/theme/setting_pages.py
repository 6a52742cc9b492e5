"""The page of settings: every key of a study file with its type, default and meaning, from the JSON schema.

`atp_tune.config.studyfile` makes the schema from the pydantic models; nothing here names a key.
"""

import json
from collections.abc import Iterator
from typing import Any

from atp_tune.config.studyfile import study_schema

HEAD = """# Settings

Every key of a study file. `--set KEY=VALUE` overrides one on the command line, as in
`--set texts.validation.nsamples=8`. [Study files](../guides/study-files.md) shows a whole file.

"""
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
NAMES = {"string": "text", "boolean": "`true` or `false`", "integer": "integer", "number": "number"}
Schema = dict[str, Any]


def page() -> str:
    """The page in Markdown: a section for each table, a heading for each key."""
    schema = study_schema()
    return HEAD + "".join(_table(schema, schema, "", ""))


def _table(schema: Schema, table: Schema, place: str, what: str) -> Iterator[str]:
    """The keys of one table, then the tables in it."""
    yield f"## {f'[{place}]' if place else 'Top of the file'} {{ #{place or 'top'} }}\n\n{_sentence(what)}\n\n"
    present = table["properties"]
    for key, value in present.items():
        plain = [form for form in _forms(schema, value) if "properties" not in form]
        if plain:
            yield _key(schema, f"{place}.{key}".lstrip("."), key, value, key in table.get("required", []))
    for key, value in present.items():
        for form in _forms(schema, value):
            if "properties" in form:
                meaning = value.get("description") or form.get("description", "")
                yield from _table(schema, form, f"{place}.{key}".lstrip("."), meaning)


def _key(schema: Schema, place: str, key: str, value: Schema, needed: bool) -> str:
    is_table = any("properties" in form for form in _forms(schema, value))
    anchor = f"{place}-in-short" if is_table else place
    facts = [_type(schema, value), "required" if needed else _default(value)]
    meaning = f"Short form of the table [[{place}]](#{place})." if is_table else _sentence(value.get("description", ""))
    head = f"### `{place}` {{ #{anchor} data-toc-label='{key}' }}"
    return "\n\n".join([head, " · ".join(filter(None, facts)) + "\n{ .facts }", meaning, ""])


def _forms(schema: Schema, value: Schema) -> list[Schema]:
    forms = value.get("anyOf", [value])
    return [schema["$defs"][form["$ref"].rpartition("/")[2]] if "$ref" in form else form for form in forms]


def _type(schema: Schema, value: Schema) -> str:
    return ", or ".join(dict.fromkeys(_words(schema, form) for form in _forms(schema, value)))


def _words(schema: Schema, form: Schema) -> str:
    """A type in words."""
    if "const" in form or "enum" in form:
        return ", ".join(_toml(name) for name in form.get("enum", [form.get("const")]))
    if "properties" in form:
        return "a table"
    if form.get("type") == "array":
        items = form.get("items", {})
        if isinstance(items, list):
            return f"[{', '.join(_type(schema, item) for item in items)}]"
        return f"a list of {_type(schema, items)}"
    if form.get("type") == "object":
        return f"a table of {_type(schema, form['additionalProperties'])}"
    bounds = [f"{sign} {form[name]:,}" for name, sign in BOUNDS.items() if name in form]
    return " ".join([NAMES[form["type"]], " and ".join(bounds)]).strip()


def _default(value: Schema) -> str:
    default = value.get("default")
    return "" if default is None or isinstance(default, dict) else f"default {_toml(default)}"


def _toml(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _sentence(text: str) -> str:
    """The meaning, beginning as it is written, since it may begin with a value, and with a full stop."""
    text = " ".join(text.split())
    return f"{text}." if text and text[-1] not in ".?!" else text
