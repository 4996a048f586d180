"""`herd chat`: a conversation in the terminal, with a context or without."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import herd
from herd.cli.output import FreeFlag, JsonFlag, ModelOption, examples, note, print_json, server_data
from herd.errors import HerdError, PromptError

NAME = "chat"
EXAMPLES = examples(
    "herd chat",
    "herd chat --context ./ctx",
    "herd chat --continue",
    "herd chat --model ./scout --image sign.jpg",
    "echo 'What is a llama?' | herd chat --json",
)


def command(
    context: Annotated[
        Path | None, typer.Option("--context", "-c", metavar="DIR", help="Answer each line from this context.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Show this image with the first line; may be repeated.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; without --context only.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest one.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, what was said before is less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes draws repeatable.")] = None,
    free: FreeFlag = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep it here, as herd serve does. Default: where that keeps chats."),
    ] = None,
    go_on: Annotated[bool, typer.Option("--continue", help="Go on with the chat that changed last.")] = False,
    model: ModelOption = "cria",
    as_json: JsonFlag = False,
) -> None:
    """Chat, one line per turn, until Ctrl-D.

    Without a context the model sees the whole conversation. With one, each line is a question of its own about what
    the context holds. In a terminal, or with --data, chats are kept, and the page of herd serve shows them; /help lists
    commands. --json prints the list of turns at the end.
    """
    from herd.engine import Sampler

    sampler = Sampler(temperature, top_p, top_k, seed, min_p, repetition_penalty)
    if context is not None and (temperature or sampler.penalises):
        raise PromptError("answers from a context are greedy; leave temperature and penalty out, or --context")
    if context is not None and image:
        raise PromptError("contexts are asked without images; leave --image out, or --context")
    from herd.cli.talk import Kept, Talk, interrupted

    loaded = herd.load(model)
    opened = None if context is None else herd.Context.open(context, loaded)
    keeps = data is not None or go_on or sys.stdin.isatty()
    talk = Talk(loaded, opened, sampler, max_tokens, not free, Kept(data or server_data(), loaded) if keeps else None)
    if go_on:
        talk.go_on()
    talk.show(image or ())
    try:
        for line in _lines():
            try:
                if keeps and line.startswith("/"):
                    talk.follow(line)
                else:
                    talk.ask(line, quiet=as_json)
            except HerdError as error:
                if not sys.stdin.isatty():
                    raise
                note(f"error: {error}")  # the conversation goes on
    except KeyboardInterrupt:
        raise interrupted(talk) from None
    if as_json:
        print_json(talk.turns)


def _lines() -> Iterator[str]:
    """The user's turns; blank lines are left out."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if prompt:
                note("")  # ends the line of the prompt
            raise
        if line:
            yield line
