"""docs/cli.md tells of every verb, and of no option that there is not."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import typer.main

from herd.cli.main import app

TEXT = (Path(__file__).parents[2] / "docs/cli.md").read_text("utf-8")


def options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from [*parameter.opts, *parameter.secondary_opts]
    for inner in getattr(command, "commands", {}).values():
        yield from options(inner)


def test_every_verb_has_a_row_and_every_option_exists() -> None:
    root = typer.main.get_command(app)
    rows = set(re.findall(r"^\| `(\w+)", TEXT, re.M))
    assert rows == set(getattr(root, "commands"))  # noqa: B009
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert told and told <= {*options(root), "--help"}
