"""Runs every pair of methods in every setting from the command line, and says which failed.

    python benchmarks/every_pair.py digits [--jobs 2] [--out FILE.jsonl]
    python benchmarks/every_pair.py images.npz --images 1000 --model lenet5
    python benchmarks/every_pair.py digits --model resnet20 --levels layers

A run is short: it shows that a pair works, not how well. With `--images` it takes the first so many training images and
half as many test images. Results are added to the file as they come, and runs that are in it are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from espalier.bench.options import NONE
from espalier.cli import main as espalier
from espalier.method import methods
from espalier.train.settings import SETTINGS

LEVELS: dict[str, tuple[str, ...]] = {"units": SETTINGS, "layers": SETTINGS, "weights": ("constant",)}


def pairs(levels: list[str]) -> list[tuple[str, str, str]]:
    """(setting, growing method, pruning method) of all runs; those of single weights know fewer settings."""
    found: list[tuple[str, str, str]] = []
    for level in levels:
        settings = LEVELS[level]
        growing = [entry.method.name for entry in methods("grow", level) if entry.by_budget]
        pruning = [entry.method.name for entry in methods("prune", level) if entry.by_budget]
        found += [(setting, *pair) for setting in settings for pair in itertools.product(growing, pruning)]
        found += [("shrinking", NONE, name) for name in pruning]
        found += [("growing", name, NONE) for name in growing if level != "weights"]
    return found


def run(arguments: tuple[tuple[str, str, str], list[str], int]) -> dict[str, object]:
    """One run: exit code, the last words, seconds, and the warnings."""
    (setting, growing, pruning), source, epochs = arguments
    torch.set_num_threads(1)
    start, said = time.perf_counter(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        words = ["run", *source, "--setting", setting, "--grow", growing, "--prune", pruning, "--no-static"]
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                code = espalier([*words, "--epochs", str(epochs), "--out", f"{folder}/run"])
            except Exception as error:
                code = f"{type(error).__name__}: {error}"
    return {
        "setting": setting,
        "grow": growing,
        "prune": pruning,
        "code": code,
        "said": said.getvalue().strip()[-300:],
        "warnings": sorted({str(one.message)[:200] for one in warned}),
        "seconds": round(time.perf_counter() - start, 1),
    }


def subset(path: Path, images: int, folder: str) -> Path:
    """A file with the first images of another one."""
    with np.load(path) as whole:
        parts = {name: whole[name][: images if "train" in name else images // 2] for name in whole.files}
    small = Path(folder) / path.name
    np.savez(small, **parts)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a task, or a .npz file")
    parser.add_argument("--images", type=int, default=1000, help="training images taken of a .npz file")
    parser.add_argument("--model")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=["units", "weights"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    done = options.out.read_text().splitlines() if options.out is not None and options.out.exists() else []
    results = [json.loads(line) for line in done]
    known = {(one["setting"], one["grow"], one["prune"]) for one in results}
    with tempfile.TemporaryDirectory() as folder:
        source = [options.data]
        if options.data.endswith(".npz"):
            source = ["--data", str(subset(Path(options.data), options.images, folder))]
        if options.model is not None:
            source += ["--model", options.model]
        tasks = [(pair, source, options.epochs) for pair in pairs(options.levels) if pair not in known]
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for one in pool.imap_unordered(run, tasks):
                results.append(one)
                if options.out is not None:
                    with options.out.open("a") as file:
                        file.write(json.dumps(one) + "\n")
    failed = [one for one in results if one["code"] != 0]
    for one in failed:
        print(f"{one['setting']}, grow {one['grow']}, prune {one['prune']}: {one['code']}: {one['said']}")
    print(f"{len(results) - len(failed)} of {len(results)} runs on {options.data} ended well")


if __name__ == "__main__":
    main()
