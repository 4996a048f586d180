"""What a user can cause and fix. Every message is one line, carries the numbers and names the fix.

HerdError
├── ConfigError      a config.json or recipe that describes no model or run we can build
├── CheckpointError  weights that are missing, extra, misshapen or unreadable
├── SourceError      a path the user named that cannot be read at all
├── ContextError     a context folder that is damaged, locked, full or made by another model
├── LibraryError     a library of chats that is damaged, served by another process, or has not what is asked for
└── PromptError      a question or conversation that cannot be put to this model
"""


class HerdError(Exception):
    """Base of all errors a user can cause; the command line prints it as one line and exits with 2."""


class ConfigError(HerdError):
    """A configuration that describes no model or run we can build."""


class CheckpointError(HerdError):
    """Weights that are missing, extra, misshapen or unreadable."""


class SourceError(HerdError):
    """A path the user named that cannot be read at all."""


class ContextError(HerdError):
    """A context folder that is damaged, locked, full or made by another model."""


class LibraryError(HerdError):
    """A library of chats that is damaged, served by another process, or has not what is asked for."""


class PromptError(HerdError):
    """A question or conversation that cannot be put to this model."""
