"""Check the size caps: no file over 400 lines (500 for C++), no function over 60. Usage: python tools/caps.py [ROOT]"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = {".py": 400, ".cpp": 500, ".h": 500}
FUNCTION_LINES = 60
FOLDERS = ("herd", "tests", "tools", "bench")


def long_functions(source: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, number of lines) of every function over the cap; decorators are not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield node.name, node.lineno, lines


def complaints(root: Path) -> list[str]:
    """One line per file or function under `root` that is over its cap."""
    found = []
    for path in sorted(p for folder in FOLDERS for p in (root / folder).rglob("*") if p.suffix in FILE_LINES):
        source = path.read_text(encoding="utf-8")
        lines = source.count("\n")
        name = path.relative_to(root)
        if lines > FILE_LINES[path.suffix]:
            found.append(f"{name}: {lines} lines, at most {FILE_LINES[path.suffix]}")
        if path.suffix == ".py":
            for function, at, length in long_functions(source):
                found.append(f"{name}:{at}: {function} has {length} lines, at most {FUNCTION_LINES}")
    return found


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    found = complaints(root)
    print("\n".join(found) if found else "size caps: ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
