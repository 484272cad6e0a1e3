"""The search that a benchmark is asked for, by the options of `espalier evolve`."""

from __future__ import annotations

import argparse

from espalier.bench.evolve import EvolveOptions, chosen


def asked_for(what: str) -> EvolveOptions:
    """What the command line of a benchmark that does `what` says."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("task", nargs="?")
    parser.add_argument("--data")
    parser.add_argument("--model")
    parser.add_argument("--width", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--cycles", type=int)
    parser.add_argument("--proposals")
    return chosen(vars(parser.parse_args()))


__all__ = ["asked_for"]
