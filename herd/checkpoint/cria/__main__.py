"""`python -m herd.checkpoint.cria`: build Cria in the cache folder, if that is not done yet, and print where it is."""

import logging
import sys

from herd.checkpoint.cria.build import cria_path
from herd.errors import HerdError


def main() -> int:
    """Exit code 0, or 2 for what the user can fix."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(cria_path())
    except HerdError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
