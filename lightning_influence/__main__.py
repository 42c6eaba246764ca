"""`python -m lightning_influence`: the same as `lightning-influence`."""

import sys

from lightning_influence.cli import main

if __name__ == "__main__":
    sys.exit(main())
