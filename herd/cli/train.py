"""`herd train`: run one recipe."""

from pathlib import Path
from typing import Annotated

import typer

from herd.cli.output import JsonFlag, examples, interruptible, note, print_json
from herd.cli.progress import training
from herd.errors import ConfigError

NAME = "train"
EXAMPLES = examples("herd train recipes/cria.toml", "herd train recipes/cria.toml --run-dir runs/cria --resume")


def command(
    recipe: Annotated[Path, typer.Argument(help="A TOML file; recipes/ holds ours.")],
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train by a recipe. Checkpoints, metrics, the curve and the delta stand in the folder of the run."""
    from herd import train
    from herd.train import curve

    folder = run_dir or Path("runs") / recipe.stem
    with interruptible(f"the last checkpoint in {folder} is kept; --resume goes on from it"), training() as progress:
        figures = train.run(recipe, folder, resume=resume, progress=progress)
    try:
        curve.draw(folder)
    except ConfigError as error:  # the run itself is complete
        note(f"no curve.png: {error}")
    result = {"recipe": str(recipe), "run_dir": str(folder), **figures}
    if as_json:
        print_json(result)
    else:
        print("\n".join(f"{name} {value}" for name, value in result.items()))
