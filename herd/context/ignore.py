"""`.gitignore` rules, nested as in git: the file nearest to a path decides, later lines win, `!` takes back."""

import os
from dataclasses import dataclass

import pathspec

_FILE = b".gitignore"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Ignore:
    """The rules in force inside one folder: (folder, spec) from the outermost to the innermost."""

    rules: tuple[tuple[bytes, pathspec.GitIgnoreSpec], ...] = ()

    @classmethod
    def above(cls, root: bytes) -> "Ignore":
        """Rules of the git work tree around `root` that reach into it; none if it is in no work tree."""
        outer, folder = [], os.path.dirname(root)
        if os.path.lexists(os.path.join(root, b".git")):
            return cls()._add(root, os.path.join(root, b".git", b"info", b"exclude"))
        while True:
            outer.append(folder)
            if os.path.lexists(os.path.join(folder, b".git")):
                break
            parent = os.path.dirname(folder)
            if parent == folder:
                return cls()
            folder = parent
        ignore = cls()._add(folder, os.path.join(folder, b".git", b"info", b"exclude"))
        for folder in reversed(outer):
            ignore = ignore.enter(folder)
        # Who names a folder that git ignores wants it read (a Python installed inside a repository, say).
        return cls() if ignore.ignores(root, True) else ignore

    def enter(self, folder: bytes) -> "Ignore":
        """These rules and those of the folder's own `.gitignore`."""
        return self._add(folder, os.path.join(folder, _FILE))

    def ignores(self, path: bytes, is_folder: bool) -> bool:
        for folder, spec in reversed(self.rules):
            relative = os.fsdecode(os.path.relpath(path, folder)) + ("/" if is_folder else "")
            decision = spec.check_file(relative).include
            if decision is not None:
                return bool(decision)
        return False

    def _add(self, folder: bytes, file: bytes) -> "Ignore":
        try:
            # Not a regular file (a pipe, say): git does not read it either.
            if not os.path.isfile(file) or os.path.getsize(file) > _MAX_BYTES:
                return self
            with open(file, encoding="utf-8", errors="surrogateescape") as lines:
                spec = pathspec.GitIgnoreSpec.from_lines(lines.read().splitlines())
        except (OSError, ValueError):
            # An unreadable rule file ignores nothing; the file itself is listed as skipped by the walk.
            return self
        return Ignore((*self.rules, (folder, spec)))
