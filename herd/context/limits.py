"""How much can be read. Imports nothing heavy: the help of the command names these limits."""

MAX_BYTES = 64 << 20  # of one source
