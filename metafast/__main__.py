"""`python -m metafast` is the command `metafast`."""

import sys

from metafast.cli import main

if __name__ == "__main__":
    sys.exit(main())
