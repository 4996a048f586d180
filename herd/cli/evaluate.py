"""`herd eval`: measure, and write a result that says how it was made."""

from pathlib import Path
from typing import Annotated

import typer

import herd
from herd.cli.output import FreeFlag, JsonFlag, KvOption, ModelOption, examples, interruptible, note, print_json

NAME = "eval"
EXAMPLES = examples(
    "herd eval needle --length 128K,1M --out eval/needle.json",
    "herd eval lookup --length 128K --trials 200 --json",
    "herd eval context --length 1M --out eval/context.json",
    "herd eval perplexity",
    "herd eval quantisation --out eval/quantisation.json",
)


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="needle, lookup, context, perplexity or quantisation.")],
    length: Annotated[str, typer.Option(help="Context lengths in tokens, like 8K,128K,1M, where one is read.")] = "",
    trials: Annotated[int | None, typer.Option(help="Questions per length. Default: the published number.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses sources, questions and needles.")] = 0,
    kv: KvOption = None,
    free: FreeFlag = False,
    base: Annotated[bool, typer.Option(help="Also measure the unchanged base model.")] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result here as JSON.")] = None,
    work_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Keeps sources and contexts, so that a second run reads nothing again.")
    ] = Path("build/eval"),
    model: ModelOption = "cria",
    as_json: JsonFlag = False,
) -> None:
    """Run one evaluation: needle, lookup (with absent questions and baselines), context (cost), perplexity, or
    quantisation (formats of weights)."""
    from herd import eval as evaluation

    lengths = [part for part in length.split(",") if part]
    with interruptible(f"no result was written; what was read is kept in {work_dir}"):
        result = evaluation.run(
            name,
            herd.load(model),
            lengths=lengths,
            trials=trials,
            out=out,
            workdir=work_dir,
            progress=note,
            seed=seed,
            kv=kv,
            quote=not free,
            with_base=base,
        )
    if as_json:
        print_json(result)
        return
    for row in evaluation.summary(result):
        print("  ".join(f"{name} {value}" for name, value in row.items()))
