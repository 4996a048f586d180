"""Fill in what README.md and docs/benchmarks.md say of committed results: eval/*.json, eval/demo.txt, bench/results.

Usage: python tools/readme.py [--check]. With --check nothing is written; exit code 1 if a text is not up to date.
No figure is typed by hand: the tables hold what the results hold.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import table as beside  # noqa: E402

TEN_MILLION = 10_000_000


def rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(what, measured, asked for) of one result file's figures."""
    for one in result["results"]:
        kind, size = one["eval"], f"{_size(one.get('length'))} tokens"
        if one.get("kv", "int8") != "int8":
            size += f" in {one['kv']}"
        if kind == "needle":
            yield (
                f"needle, {size}, {one['trials']} trials: exact",
                _percent(one["exact"]),
                _goal(one, 97, 95, 95),
            )
            yield f"needle, {size}: value right, whatever the answer names", _percent(one["value_right"]), ""
            yield f"needle, {size}: first citation right", _percent(one["first_citation_right"]), ""
            yield f"needle, {size}: called absent although it is there", _percent(one["said_absent"]), ""
        elif kind == "lookup":
            yield from _lookup(one, size)
        elif kind == "context":
            yield from _context(one, size)
        elif kind == "perplexity":
            yield from _perplexity(one)


def _perplexity(one: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    after, name = one["after_bos"], f"perplexity of {one['text']}"
    if "change_percent" not in one:
        yield f"{name} after a BOS token", f"{after['perplexity']:.2f}", ""
        return
    yield f"{name} against the base model", f"{one['change_percent']:+.2f} %", "≤ +2 %"
    yield "the same after a BOS token", f"{after['change_percent']:+.2f} % ({after['perplexity']:.2f})", ""


def _lookup(one: dict[str, Any], size: str) -> Iterator[tuple[str, str, str]]:
    name = f"lookup, {size}, {one['questions']} questions"
    yield f"{name}: exact", _percent(one["exact"]), _goal(one, 85, 80, 75)
    yield f"{name}: first citation right", _percent(one["first_citation_right"]), "≥ 90 %"
    yield f"{name}: called absent although it is there", _percent(one["said_absent"]), ""
    yield f"{name}: BM25 alone, right chunk first", _percent(one["baselines"]["bm25"]["first_chunk_right"]["all"]), ""
    if "rag" in one["baselines"]:
        yield (
            f"{name}: BM25 top 5 + base model, value in answer",
            _percent(one["baselines"]["rag"]["value_in_answer"]["all"]),
            "",
        )
    yield (
        f"absent answers, {size}, {one['absent']['questions']} questions: said so",
        _percent(one["absent"]["right"]),
        "≥ 80 %",
    )


def _context(one: dict[str, Any], size: str) -> Iterator[tuple[str, str, str]]:
    ten = one["length"] == TEN_MILLION
    per_token = "≤ 220" if one["kv"] == "int4" else "≤ 400"
    yield f"reading {size}", f"{one['read_tokens_per_s']:,} tokens/s", "≥ 5,600" if ten else "≥ 2,000"
    yield f"K/V on disk, {size}", f"{one['bytes_per_token']} bytes/token", per_token
    yield f"peak memory, {size}", f"{max(one['peak_memory_gb'].values())} GB", "≤ 6 GB" if ten else "≤ 3 GB"
    first, edit = "first token", f"edit a file and ask, {size}"
    yield f"second ask, {size}: {first}", f"{one['second_ask_first_token_s']} s", "≤ 3 s"
    yield f"{edit}: {first}", f"{one['edit_and_ask_first_token_s']} s", "≤ 4 s" if ten else "≤ 5 s"
    yield f"{edit}: whole answer", f"{one['edit_and_ask_s']} s", ""
    if "decode_tokens_per_s" in one:
        rate, share = f"{one['decode_tokens_per_s']} tokens/s", _percent(one["decode_read_share"])
        yield f"answering over {size}", rate, "≥ 12 tokens/s" if ten else ""
        yield f"answering over {size}: share of memory read", share, "≥ 70 %" if ten else ""


def table(folder: Path) -> str:
    """The table of all results of Cria as it is shipped in a folder, and where each was measured."""
    lines = ["| what | measured | goal | result |", "|---|---|---|---|"]
    machines = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["model"]["name"] != "cria":  # docs/quantisation.md has other formats of its weights
            continue
        machine = result["machine"]
        machines.append(f"{machine['cpu']}, {machine['threads']} threads, {machine['memory_gb']} GB")
        link = f"[{path.name}](eval/{path.name})"
        lines += [f"| {what} | {measured} | {goal} | {link} |" for what, measured, goal in rows(result)]
    if not machines:
        return "Nothing is measured yet."
    where = "; ".join(dict.fromkeys(machines))
    return "\n".join([*lines, "", f"Machine: {where}. Each result file names its command."])


def transcript(path: Path) -> str:
    """The committed output of `make demo`."""
    if not path.is_file():
        return "No transcript yet."
    return f"```\n{path.read_text(encoding='utf-8').strip()}\n```"


def texts() -> dict[Path, str]:
    """Every text that holds results, with what stands between its markers replaced."""
    sped = beside.load(sorted(ROOT.glob(beside.RESULTS), reverse=True))
    parts = {
        "README.md": {
            "measured": table(ROOT / "eval"),
            "transcript": transcript(ROOT / "eval" / "demo.txt"),
            "beside": beside.ratios(sped),
        },
        "docs/benchmarks.md": {"tables": beside.table(sped).strip()},
    }
    found = {}
    for name, its in parts.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for marker, part in its.items():
            text = _put(text, marker, part)
        found[ROOT / name] = text
    return found


def _put(text: str, name: str, part: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{part}\n{end}", text, flags=re.DOTALL)


def _percent(share: float | None) -> str:
    return "none asked" if share is None else f"{100 * share:.1f} %"


def _goal(one: dict[str, Any], at_128k: int, at_1m: int, at_10m: int) -> str:
    goals = {128_000: at_128k, 131_072: at_128k, 1_000_000: at_1m, 1_048_576: at_1m, TEN_MILLION: at_10m}
    return f"≥ {goals[one['length']]} %" if one["length"] in goals else ""


def _size(tokens: int | None) -> str:
    return f"{tokens:,}" if tokens else ""


def main() -> int:
    stale = {path: text for path, text in texts().items() if path.read_text(encoding="utf-8") != text}
    if "--check" in sys.argv[1:]:
        names = ", ".join(path.name for path in stale)
        print(f"not what the results say: {names}; run: python tools/readme.py" if stale else "up to date")
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
