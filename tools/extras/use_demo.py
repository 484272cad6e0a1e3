"""The data set and the progress of `espalier run digits`."""

import sys

import rich  # noqa: F401

from espalier.cli import main

sys.exit(main("run digits --width 0.125 --epochs 1 --no-static --out run".split()))
