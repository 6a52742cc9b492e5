"""`tune.py schema`: prints the JSON schema of study files."""


def schema() -> None:
    """Print the JSON schema of study files, by which editors complete keys and mark mistakes.

    It is shipped beside the studies as `study.schema.json`. A study file names it in its first line,
    `#:schema ./study.schema.json`, which Taplo and Even Better TOML (VS Code) read.

    Example: `python tune.py schema > study.schema.json`
    """
    from atp_tune.spec.schema import schema_text

    print(schema_text(), end="")
