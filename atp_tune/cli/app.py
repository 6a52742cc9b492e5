"""The command line: which commands there are, in the order of `--help`."""

import typer

from atp_tune.cli.commands import (
    apply,
    evaluate,
    export,
    finetune,
    merge,
    plan,
    prune,
    report,
    serve,
    speedup,
    status,
    studies,
    tune,
)

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)

app.callback(invoke_without_command=True)(tune.run)
app.command()(status.status)
app.command()(plan.plan)
app.command()(serve.serve)
app.command()(merge.merge)
app.command()(export.export)
app.command()(report.report)
app.command()(apply.apply)
app.command()(evaluate.evaluate)
app.command()(prune.prune)
app.command()(finetune.finetune)
app.command()(speedup.speedup)
app.command()(studies.studies)
