"""`herd context`: look after a context folder. None of these needs the model."""

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after a context folder.")


@app.callback()
def context() -> None:
    """Look after a context folder: show, verify, compact, export, import, merge."""
