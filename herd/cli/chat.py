"""`herd chat`: a conversation in the terminal, with a context or without."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import herd
from herd.cli.output import FreeFlag, Interrupted, JsonFlag, ModelOption, examples, note, print_json
from herd.cli.report import TextOut, citation_json, print_citations
from herd.errors import PromptError

NAME = "chat"
EXAMPLES = examples(
    "herd chat",
    "herd chat --context ./ctx",
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
    model: ModelOption = "cria",
    as_json: JsonFlag = False,
) -> None:
    """Chat, one line per turn, until Ctrl-D.

    Without a context the model sees the whole conversation. With one, each line is a question of its own about what
    the context holds. --json prints the list of turns at the end.
    """
    from herd.engine import Sampler

    sampler = Sampler(temperature, top_p, top_k, seed, min_p, repetition_penalty)
    if context is not None and (temperature or sampler.penalises):
        raise PromptError("answers from a context are greedy; leave temperature and penalty out, or --context")
    if context is not None and image:
        raise PromptError("contexts are asked without images; leave --image out, or --context")
    loaded = herd.load(model)
    opened = None if context is None else herd.Context.open(context, loaded)
    turns: list[dict[str, Any]] = []
    try:
        for line in _lines():
            out = TextOut(quiet=as_json)
            turns.append({"role": "user", "content": line})
            if image and len(turns) == 1:
                turns[0]["images"] = [str(path) for path in image]
            try:
                if opened is not None:
                    answer = opened.ask(line, max_tokens=max_tokens, quote=not free, on_text=out)
                    reply = {"content": answer.text, "citations": [citation_json(c) for c in answer.citations]}
                else:
                    ids, shown = loaded.tokenizer.chat([_message(turn) for turn in turns]), image or ()
                    new = loaded.generate(ids, images=shown, max_tokens=max_tokens, sampler=sampler, on_text=out)
                    reply = {"content": new.text}
            finally:
                out.end()
            if opened is not None and not as_json:
                print_citations(answer)
            turns.append({"role": "assistant", **reply})
    except KeyboardInterrupt:
        raise Interrupted("the conversation is not kept; a context is left as it was") from None
    if as_json:
        print_json(turns)


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    """What the model's chat template gets."""
    content = turn["content"]
    if images := turn.get("images"):
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": content}]
    return {"role": turn["role"], "content": content}


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
