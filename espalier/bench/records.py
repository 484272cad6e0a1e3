"""What a run leaves behind, read back: `config.json` and the lines of `metrics.jsonl`.

`config.json` is one object: the options of the run, the command, versions. Every line of `metrics.jsonl` is an object
with a `kind`:

    start         parameters, flops (per sample), axes {name: size}, weights {parameter that has a mask: [live, all]},
                  depth {stage: number of layers or cells} if a method changes it, architecture [{module, type, shape,
                  parameters}], gates if a method has any, and map and points {inputs, labels} if inputs are points
                  of a plane then
    epoch         epoch, step, train_loss, train_accuracy, val_loss, val_accuracy, learning_rate, parameters, flops,
                  axes, weights, depth, training_flops, seconds; gates if a method has any; map at a few epochs
    event         step, epoch, method, action (grow or prune), axes {name: [before, after]}, masks {parameter: [live
                  before, after]}, layers [what came or went], widths {name: size} of all axes after it if any
                  did, weights and depth (after it), parameters [before, after], flops [before, after], loss [before,
                  after] on the same batch, contract, training_flops, seconds
    static_epoch  as epoch, for the static network of the final size
    end           test_accuracy, test_loss, parameters, flops, axes, weights, depth, architecture, training_flops,
                  seconds, and static: null or the same figures of the static network

gates is {stage: 0 before the search, 1 in it, 2 after it; k; axes {what has gates: how many have a probability in each
of some equal parts of [0, 1]}; asleep {axis: units outside of the network}}. map is {x, y: [first, last], values: rows,
from the first y on, of the probability of the second of two classes}.

Everything in the folder is data from others: nothing is executed, what cannot be read is left out and said.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from espalier.errors import DataError

Record = Mapping[str, object]

KINDS = ("start", "epoch", "event", "static_epoch", "end")
LARGEST = 1e90  # beyond this a value is no measurement, and drawing it would overflow


@dataclass(frozen=True)
class Run:
    """What a run folder holds: `records` in the order written, and the same ones by kind."""

    config: Record
    records: tuple[Record, ...]
    start: Record
    epochs: tuple[Record, ...]
    events: tuple[Record, ...]
    static_epochs: tuple[Record, ...]
    end: Record | None
    notices: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        DataError: `config.json` or `metrics.jsonl` is missing or holds nothing that can be read.
    """
    config = read_config(folder)
    records, notices = read_records(folder / "metrics.jsonl", KINDS)
    by_kind = {kind: tuple(record for record in records if record["kind"] == kind) for kind in KINDS}
    end = by_kind["end"][-1] if by_kind["end"] else None
    if end is None:
        notices.insert(0, "This run has not ended: it is still going on or was interrupted. The page shows it so far.")
    return Run(
        config,
        tuple(records),
        by_kind["start"][0] if by_kind["start"] else {},
        by_kind["epoch"],
        by_kind["event"],
        by_kind["static_epoch"],
        end,
        tuple(notices),
    )


def read_config(folder: Path) -> Record:
    """The object in `config.json`.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        config = json.loads(_read_text(folder / "config.json"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{folder / 'config.json'}: expected one JSON object with the run's configuration, found something that is "
            f"not JSON ({error}); restore the file or run again"
        ) from error
    if not isinstance(config, dict):
        raise DataError(
            f"{folder / 'config.json'}: expected a JSON object with the run's configuration, found "
            f"{type(config).__name__}; restore the file or run again"
        )
    return config


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise DataError(
            f"{path}: expected a file written by a run, found none that can be read ({error.strerror}); "
            f"give the folder that the run's --out named"
        ) from error


def read_records(path: Path, kinds: Collection[str]) -> tuple[list[Record], list[str]]:
    """The readable records of these kinds, and a sentence for the reader about each sort of line that was left out.

    Raises:
        DataError: the file is missing, or holds none.
    """
    # Not splitlines(): JSON text may hold U+2028 and other characters that it would split at.
    lines = [(at, line) for at, line in enumerate(_read_text(path).split("\n"), start=1) if line.strip()]
    records: list[Record] = []
    broken, unknown = [], 0
    for at, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            broken.append(at)
        elif record.get("kind") in kinds:
            records.append(record)
        else:
            unknown += 1
    if not records:
        raise DataError(
            f"{path}: expected one JSON object per line with a kind among {', '.join(kinds)}, found {len(lines)} lines "
            f"and none of these; the run wrote nothing yet, or this is another file"
        )
    notices = []
    if broken and broken[-1] == lines[-1][0]:
        broken.pop()
        notices.append(f"The last line of {path.name} was cut short (an interrupted run) and is left out.")
    if broken:
        notices.append(f"Lines of {path.name} that cannot be read and are left out: {', '.join(map(str, broken))}.")
    if unknown:
        notices.append(f"{unknown} records of a kind that this version does not know are left out.")
    return records, notices


def as_number(value: object) -> float | None:
    """A finite number, or None: null, booleans, text such as "nan" and absurd magnitudes are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -LARGEST < value < LARGEST else None


def as_pair(value: object) -> tuple[object, object]:
    """The two values of a [before, after], or two Nones."""
    return (value[0], value[1]) if isinstance(value, list) and len(value) == 2 else (None, None)


def as_mapping(value: object) -> Record:
    """The object itself if it is one, else an empty one."""
    return value if isinstance(value, dict) else {}


def latest(run: Run, key: str) -> object:
    """The last value that any record of our own network has for `key`; events hold [before, after]."""
    for record in reversed(run.records):
        value = record.get(key)
        if record["kind"] != "static_epoch" and value is not None:
            return as_pair(value)[1] if isinstance(value, list) else value
    return None


def action_of(event: Record) -> str:
    """What an event did. A method with gates both wakes units and lets them sleep, under one name: then sizes tell."""
    action = str(event.get("action"))
    if action not in ("grow", "prune") or event.get("layers"):
        return action
    sizes = [tuple(map(as_number, as_pair(pair))) for pair in as_mapping(event.get("axes")).values()]
    ways = {after > before for before, after in sizes if before is not None and after is not None and after != before}
    if len(ways) != 1:
        return action
    return "grow" if ways.pop() else "prune"


def count_of(run: Run, action: str) -> int:
    """How many events of an action there were."""
    return sum(action_of(event) == action for event in run.events)


def actions_of(run: Run) -> list[str]:
    """The different actions of the events, in order of the alphabet."""
    return sorted({action_of(event) for event in run.events})
