"""The command `espalier`: reads the arguments, calls what does the work, turns errors into one line and an exit code.

Exit codes: 0 done, 1 the reader of the output went away, 2 wrong input or nothing that can be done, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from espalier.bench.advising import SPLITS, Wanted, find_subject, write_plans
from espalier.bench.evolve import PROPOSALS, chosen, evolve
from espalier.bench.folder import next_free
from espalier.bench.inspection import as_json, inspect
from espalier.bench.listing import methods_text
from espalier.bench.models import MODELS
from espalier.bench.options import check_device, resolve
from espalier.bench.progress import progress_on
from espalier.bench.report import write_report
from espalier.bench.report_search import write_search_report
from espalier.bench.run import resume, start
from espalier.bench.search_progress import search_progress_on
from espalier.bench.search_records import is_search
from espalier.errors import EspalierError, RunError
from espalier.method import load_methods
from espalier.parts.recommend.advising import recommend
from espalier.parts.recommend.criteria import CRITERIA
from espalier.suite.comparing import Results
from espalier.suite.declared import find_suite, shipped
from espalier.suite.pages import write_pages
from espalier.suite.running import Place, Plan, status
from espalier.suite.running import run as run_suite
from espalier.suite.speed import run_speed
from espalier.version import __version__

_BENCH = ("run", "status", "report", "speed")
_METHODS_FROM = "a Python file that registers methods of your own"
WRONG_INPUT, INTERRUPTED, BROKEN_PIPE = 2, 130, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is without the program's name (default: that of the process). Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    try:
        code = options.call(options, words)
        sys.stdout.flush()
    except EspalierError as error:
        print(f"espalier: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT
    except BrokenPipeError:
        # what is still in the buffer would fail again when the interpreter exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:  # a full disk, for one
        print(f"espalier: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("espalier: interrupted", file=sys.stderr)
        return INTERRUPTED
    return int(code)


def _inspect(options: argparse.Namespace, words: list[str]) -> int:
    structure = inspect(options.target)
    if options.json:
        print(json.dumps(as_json(options.target, structure), indent=2))
    else:
        print(structure)
    return 0


def _run(options: argparse.Namespace, words: list[str]) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("call", "out", "resume")}
    if options.resume and options.out is None:
        raise RunError("--resume needs the folder of the run: --out DIR")
    out: Path | None = options.out
    try:
        with progress_on(sys.stdout) as progress:
            if out is not None and options.resume:
                outcome = resume(out, given, progress)
            else:
                chosen = resolve(given)
                out = out or next_free(Path("runs"), chosen.task)
                outcome = start(chosen, out, progress, command=["espalier", *words])
    except KeyboardInterrupt:
        if out is None or not (out / "config.json").exists():
            raise
        again = shlex.join(["espalier", "run", "--resume", "--out", str(out)])
        print(f"espalier: interrupted; go on with: {again}", file=sys.stderr)
        return INTERRUPTED
    print(outcome)
    return 0


def _evolve(options: argparse.Namespace, words: list[str]) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("call", "out", "workers")}
    asked = chosen(given)
    out: Path = options.out or next_free(Path("runs"), f"evolve-{Path(asked.problem.source).stem}")
    try:
        with search_progress_on(sys.stdout) as progress:
            outcome = evolve(asked, out, progress, options.workers)
    except KeyboardInterrupt:
        again = words if options.out is not None else [*words, "--out", str(out)]
        print(f"espalier: interrupted; go on with: {shlex.join(['espalier', *again])}", file=sys.stderr)
        return INTERRUPTED
    print(outcome)
    return 0


def _bench(options: argparse.Namespace, words: list[str]) -> int:
    if options.methods_from is not None:
        load_methods(options.methods_from)
    suite = find_suite(options.suite)
    check_device(options.device)
    only: dict[str, list[str]] = {}
    for one in options.only:
        field, equals, value = one.partition("=")
        if not equals:
            raise RunError(f"--only: expected FIELD=VALUE, found {one!r}")
        only.setdefault(field, []).append(value)
    place = Place(
        options.out or Path("runs") / f"bench-{suite.name}",
        options.device,
        None if options.methods_from is None else str(options.methods_from.resolve()),
        tuple(options.records),
    )
    plan = Plan(suite, place, only)
    if options.what == "status":
        print(status(plan, place.kept()))
    elif options.what == "report":
        results = Results(plan, place.kept())
        print(*write_pages(results, place.out, ["espalier", *words], options.page), sep="\n")
    elif options.what == "speed":
        print(run_speed(plan, place, partial(print, flush=True)))
    else:
        say = partial(print, flush=True)
        try:
            print(run_suite(plan, place, say, processes=options.processes, minutes=options.minutes))
        except KeyboardInterrupt:
            print(f"espalier: interrupted; go on with: {shlex.join(['espalier', *words])}", file=sys.stderr)
            return INTERRUPTED
    return 0


def _methods(options: argparse.Namespace, words: list[str]) -> int:
    if options.methods_from is not None:
        load_methods(options.methods_from)
    print(methods_text())
    return 0


def _report(options: argparse.Namespace, words: list[str]) -> int:
    write = write_search_report if is_search(options.folder) else write_report
    print(write(options.folder))
    return 0


def _recommend(options: argparse.Namespace, words: list[str]) -> int:
    subject = find_subject(
        Wanted(
            options.target, options.data, options.model, options.width, options.split, options.batches,
            options.batch_size, options.seed,
        )
    )  # fmt: skip
    found = recommend(
        subject.structure, loss=subject.loss, batches=subject.batches, criterion=options.criterion,
        samples=options.samples or subject.samples, axes=options.axes, layers=options.layers,
        permutations=options.permutations, seed=options.seed,
    )  # fmt: skip
    if options.plans is not None:
        write_plans(found, options.plans)
    if options.json:
        print(json.dumps({"target": options.target, **found.as_json()}, indent=2))
    else:
        print(found.table(options.top))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="espalier", description="Grow and prune neural networks while they train.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"espalier {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="train a network that grows and shrinks, with a report",
        description="Train a network that grows and shrinks on a data set, and the static network of the same final "
        "size and training FLOPs beside it. Leaves a folder with the network and report.html.",
    )
    command.set_defaults(call=_run)
    _add_run_arguments(command)

    command = commands.add_parser(
        "evolve",
        allow_abbrev=False,
        help="search for a better network while training it",
        description="Train a network, branch off edited copies now and then, and go on from the one that is better on "
        "held-out data; beside it the network trained alone for as many FLOPs. Given again, the command goes on.",
    )
    command.set_defaults(call=_evolve)
    _add_evolve_arguments(command)

    command = commands.add_parser(
        "bench",
        allow_abbrev=False,
        help="run a suite of the common benchmark, and compare methods",
        description="Run what is missing of a suite, say how far it is, or write its results. Cells are kept by their "
        "content, so the same command goes on where it was interrupted.",
    )
    command.set_defaults(call=_bench)
    _add_bench_arguments(command)

    command = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="show which parts of a network can grow and shrink",
        description="Show the axes of a network: its independent widths, what each unit costs, and for every width "
        "that may not change, why.",
    )
    command.add_argument(
        "target",
        metavar="TARGET",
        help=f"a built-in network ({', '.join(MODELS)}), timm:NAME, torchvision:NAME, "
        "hf:TYPE (bert, gpt2, llama, vit, ... of transformers, with random weights), or package.module:function that "
        "returns a model and example inputs",
    )
    command.add_argument("--json", action="store_true", help="as JSON")
    command.set_defaults(call=_inspect)

    command = commands.add_parser(
        "recommend",
        allow_abbrev=False,
        help="say which edits of a trained network are likely to help, and why",
        description="Look at every axis and layer of a trained network and print a ranked table of edits that are "
        "likely to help, each with its reasons and with what it is predicted to change.",
    )
    command.set_defaults(call=_recommend)
    _add_recommend_arguments(command)

    command = commands.add_parser(
        "methods", allow_abbrev=False, help="list the methods that grow and prune", description="List the methods."
    )
    command.add_argument("--methods-from", metavar="FILE.py", help=_METHODS_FROM)
    command.set_defaults(call=_methods)

    command = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="write the report of a run or a search again",
        description="Write report.html in the folder of a run or a search again, also while it goes on.",
    )
    command.add_argument("folder", metavar="DIR", type=Path, help="its folder")
    command.set_defaults(call=_report)
    return parser


def _add_evolve_arguments(command: argparse.ArgumentParser) -> None:
    def add(*names: str, **details: Any) -> None:
        command.add_argument(*names, **{"default": None, **details})

    add("task", metavar="TASK", nargs="?", help="digits (default), moons, mnist, cifar10, cifar100 or svhn")
    add("--data", metavar="FILE.npz", help="instead of a task: arrays x_train, y_train, x_test, y_test")
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}; default: the task's")
    add("--width", type=float, metavar="FACTOR", help="units of the start, as a multiple of the full network's")
    add("--epochs", type=int, metavar="N", help="the budget: training FLOPs that so many epochs of the start take")
    add("--batch-size", type=int, metavar="N")
    add("--lr", type=float, metavar="RATE", help="largest learning rate of the schedule")
    add("--seed", type=int, metavar="N", help="of weights, data order, validation split and edits; default 0")
    add("--cycles", type=int, metavar="N", help="how often branches compete; default 3")
    add("--candidates", type=int, metavar="N", help="edits that are tried in each cycle; default 3")
    dear = (
        "no cycle begins as long as what it takes would lower the loss by more than this part of it as plain training"
    )
    add("--dear", type=float, metavar="PART", help=f"{dear}; default 0.03; inf: cycles in any case")
    add("--proposals", metavar="NAME", help=f"where edits come from: {', '.join(PROPOSALS)}; default {PROPOSALS[0]}")
    what = "the rise of the loss that a network of e times"
    add("--price-parameters", type=float, metavar="LOSS", help=f"{what} fewer parameters is worth; default 0")
    add("--price-flops", type=float, metavar="LOSS", help=f"{what} fewer FLOPs per inference is worth; default 0")
    add("--price-latency", type=float, metavar="LOSS", help=f"{what} lower latency, measured here, is worth")
    add("--no-baseline", dest="baseline", action="store_false", help="leave out the start trained alone")
    add("--out", type=Path, metavar="DIR", help="folder of the search; default: a new one in runs/")
    command.add_argument("--workers", type=int, metavar="N", default=1, help="processes that train branches; default 1")


def _add_bench_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("what", metavar="WHAT", choices=_BENCH, help=", ".join(_BENCH))
    add("suite", metavar="SUITE", help=f"{', '.join(shipped())}, or the path of a .toml file")
    add("--out", type=Path, metavar="DIR", help="folder of records and pages; default: runs/bench-SUITE")
    add("--processes", type=int, metavar="N", default=1, help="that run cells side by side; default 1")
    add("--minutes", type=float, metavar="M", help="begin no cell after so many minutes")
    add(
        "--only",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="cells of this task, contender, track, point, seed, budget, ...; may be given again",
    )
    add("--device", metavar="NAME", default="cpu", help="cpu (default), cuda, cuda:1")
    add("--methods-from", type=Path, metavar="FILE.py", help=_METHODS_FROM)
    add("--page", type=Path, metavar="FILE.md", help="where `report` writes markdown; default: report.md in the folder")
    add(
        "--records",
        type=Path,
        metavar="FILES",
        action="append",
        default=[],
        help="records that were published with the suite, or a folder of such files, so that their cells need not be "
        "run; may be given again",
    )


def _add_recommend_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "target",
        metavar="RUN_OR_MODEL",
        help="the folder of a run; a folder that espalier.save wrote, with --model and --data; a network as `espalier "
        "inspect` takes it, with --data; or package.module:function that returns a model, example inputs, a loss "
        "function and batches",
    )
    add("--data", metavar="DATA", help="a task (digits, mnist, cifar10, ...) or FILE.npz, for all but runs")
    add("--model", metavar="NAME", help="what a saved network was built as, as `espalier inspect` takes it")
    add("--width", type=float, default=1.0, metavar="FACTOR", help="of a built-in --model; default 1")
    criteria = ", ".join(CRITERIA)
    add("--criterion", default="aic-effective", metavar="NAME", help=f"{criteria}; default aic-effective")
    add("--split", choices=SPLITS, default=SPLITS[0], help="samples to look at; default validation")
    add("--batches", type=int, default=4, metavar="N", help="to look at; default 4")
    add("--batch-size", type=int, default=128, metavar="N", help="default 128")
    add("--samples", type=int, metavar="N", help="that the network was trained on; default: those of the data")
    add("--axes", nargs="+", metavar="PATTERN", help="axes to look at; default: all")
    add("--layers", nargs="*", metavar="PATTERN", help="layers to look at, none for none; default: all")
    add("--permutations", type=int, default=39, metavar="N", help="of each test against chance; default 39")
    add("--seed", type=int, default=0, metavar="N")
    add("--top", type=int, metavar="N", help="rows to print; default: all")
    add("--plans", type=Path, metavar="DIR", help="write the plans there, to be read by espalier's Plan.load")
    add("--json", action="store_true", help="as JSON")


def _add_run_arguments(command: argparse.ArgumentParser) -> None:
    """Options of `run`; all default to None, so that --resume knows which ones were given."""

    def add(*names: str, **details: Any) -> None:
        command.add_argument(*names, **{"default": None, **details})

    add("task", metavar="TASK", nargs="?", help="digits (default), moons, mnist, cifar10, cifar100 or svhn")
    add(
        "--data",
        metavar="FILE.npz",
        help="instead of a task: arrays x_train, y_train, x_test, y_test, or points, labels",
    )
    add("--model", metavar="NAME", help=f"{', '.join(MODELS)}; default: the task's")
    add("--width", type=float, metavar="FACTOR", help="units at the start, as a multiple of the full network's")
    add("--setting", metavar="NAME", help="growing (default), shrinking or constant")
    add(
        "--method", metavar="METHOD", help="the only method of the setting, in place of --grow and --prune, such as npn"
    )
    add("--grow", metavar="METHOD", help="how to grow, or none; `espalier methods` lists all")
    add("--prune", metavar="METHOD", help="how to prune, or none")
    add("--methods-from", metavar="FILE.py", help=_METHODS_FROM)
    size = (
        "parameters at the end, as a multiple of those at the start; of single weights, the part that stays live; not "
        "for methods that decide by themselves, such as npn"
    )
    add("--size", type=float, metavar="FACTOR", help=size)
    add("--epochs", type=int, metavar="N", help="passes over the training set")
    add("--batch-size", type=int, metavar="N")
    add("--lr", type=float, metavar="RATE", help="largest learning rate of the schedule")
    add("--seed", type=int, metavar="N", help="of weights, data order, validation split and methods; default 0")
    add("--device", metavar="NAME", help="cpu (default), cuda, cuda:1, mps")
    add("--no-static", dest="static", action="store_false", help="leave out the static network of the final size")
    add("--out", type=Path, metavar="DIR", help="folder of the run; default: a new one in runs/")
    command.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out")
