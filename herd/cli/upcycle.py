"""`herd upcycle`: a dense Llama → a Llama 4 with one global layer and the same function."""

from pathlib import Path
from typing import Annotated

import typer

from herd.cli.info import describe
from herd.cli.output import JsonFlag, examples, interruptible, print_json

NAME = "upcycle"
EXAMPLES = examples(
    "herd upcycle smollm2.gguf ./smol4 --global-layer 17 --chunk 512",
    "herd upcycle ./llama-folder ./out --global-layer 8 --chunk 2048 --experts 16 --json",
)


def command(
    source: Annotated[Path, typer.Argument(help="A Llama folder (config.json, *.safetensors) or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    global_layer: Annotated[int, typer.Option(help="Source layers below the inserted global layer.")],
    chunk: Annotated[int, typer.Option(help="Attention chunk of the local layers, in tokens.")],
    experts: Annotated[int, typer.Option(help="Routed experts of the global layer.")] = 16,
    expert_width: Annotated[int, typer.Option(help="Hidden width of each expert.")] = 256,
    extra_local: Annotated[bool, typer.Option(help="Insert a new local layer right below the global one.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the new weights.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Turn a dense Llama checkpoint into a Llama 4 one that gives the same logits, up to one chunk of text.

    Its layers become local layers. One global layer with experts is inserted; it adds nothing until it is trained.
    """
    from herd.checkpoint import upcycle

    with interruptible(f"{out} was not written"):
        upcycle(
            source,
            out,
            global_layer=global_layer,
            chunk=chunk,
            experts=experts,
            expert_width=expert_width,
            extra_local=extra_local,
            seed=seed,
        )
    made = describe(str(out))
    if as_json:
        print_json(made)
    else:
        print(f"{out}: {made['parameters']:,} parameters, layers {made['layer_map']}, chunk {chunk}")
