"""`herd convert`: a checkpoint in another format or type."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from herd.cli import progress
from herd.cli.info import describe
from herd.cli.output import JsonFlag, examples, interruptible, print_json

if TYPE_CHECKING:
    from torch import Tensor

NAME = "convert"
EXAMPLES = examples(
    "herd convert ./scout-meta ./scout --format hf",
    "herd convert ./scout ./scout.gguf --format gguf --dtype int4",
    "herd convert ./scout ./scout-fp8 --format hf --dtype fp8",
    "herd convert ./scout.gguf ./scout-bf16 --format hf --dtype bf16",
    "herd convert ./scout ./scout-int4 --format herd --dtype int4",
    "herd convert cria ./cria-int4 --format herd --dtype int4 --calibrate default",
)


def command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder of Hugging Face or Meta, a GGUF file, or a folder with one."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder, or the file NAME.gguf, to write; it must not exist.")],
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="hf, gguf, or herd (packed).")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="bf16, fp16, fp32; fp8 for hf and herd; int8 and int4 for gguf and herd. Default: as it is, if it is "
            "one of the first three.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="For herd: choose the codes of int8 and int4 that change what the model makes of this text least. "
            "default: Python's own source.",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a checkpoint in another format or type, tensor by tensor.

    Interrupted, it goes on where it was when the command is repeated. Nothing of the final name is there before all is.
    """
    from herd.checkpoint import convert
    from herd.checkpoint.names import find_model
    from herd.prompt import Tokenizer

    path = find_model(source).folder
    tokenizer = (lambda: Tokenizer.load(path).to_json()) if (path / "tokenizer.model").is_file() else None
    rows = None if calibrate is None else _rows(calibrate, path)
    with interruptible(f"{out} was not written; the same command goes on"), progress.converting() as told:
        convert(path, out, format=format, dtype=dtype, tokenizer=tokenizer, calibration=rows, progress=told)
    made = describe(str(out))
    if as_json:
        print_json(made)
    else:
        print(f"{out}: {made['weight_bytes']:,} bytes, {', '.join(made['types'])}")


def _rows(text: str, path: Path) -> "Tensor":
    """Ids of the text that a model's weights are calibrated on."""
    from herd.api import load_tokenizer
    from herd.checkpoint import read_config
    from herd.data.calibration import default_rows, rows_of_file

    tokenizer, cfg = load_tokenizer(path), read_config(path)
    return default_rows(tokenizer, cfg) if text == "default" else rows_of_file(Path(text), tokenizer, cfg)
