"""`python -m herd` is the `herd` command."""

from herd.cli.main import main

main()
