"""Gates of a run over time, and maps of the plane, read back from its records; what cannot be read is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from espalier.bench.records import LARGEST, Record, Run, as_mapping, as_number

STAGES = ("pre-training", "search", "fine-tuning")
MOST_BINS, MOST_COLUMNS = 100, 200
MOST_MOMENTS = 16
MOST_POINTS = 500

Histogram = tuple[float, ...]


@dataclass(frozen=True)
class Map:
    """The plane as a network sees it."""

    x: tuple[float, float]
    y: tuple[float, float]
    values: tuple[tuple[float, ...], ...]
    """Rows, from the first y on, of the probability of the second class."""


@dataclass(frozen=True)
class Gates:
    """All gates at the end of an epoch."""

    epoch: float
    stage: str
    k: float | None
    awake: Mapping[str, Histogram]
    """Place (what has gates: an axis, a parameter, a layer) -> how many of its gates have a probability in each of some
    equal parts of [0, 1], of those in the network."""
    asleep: Mapping[str, float]
    """Place -> how many of its units sleep outside of the network."""
    map: Map | None
    record: Record

    def there(self, place: str) -> float:
        """Gates of a place that are in the network."""
        return sum(self.awake.get(place, ()))

    def open(self, place: str) -> float:
        """Those of them with a probability of at least 1/2."""
        counts = self.awake.get(place, ())
        return sum(counts[len(counts) // 2 :])

    def all(self, place: str) -> float:
        """Gates of a place, those that sleep included."""
        return self.there(place) + self.asleep.get(place, 0.0)


@dataclass(frozen=True)
class GateHistory:
    """The gates of a run, epoch by epoch."""

    epochs: tuple[Gates, ...]
    places: tuple[str, ...]
    """What had gates at some time, in the order of the first record that names it."""
    points: tuple[tuple[float, float, int], ...]
    """Some of the points that were trained on: x, y and 0 or 1."""

    def moments(self) -> list[Gates]:
        """A few epochs to look at: those with a map, or else the first, the last, and some of each stage."""
        mapped = [one for one in self.epochs if one.map is not None]
        return spread(mapped or self.epochs, MOST_MOMENTS if mapped else 12)


def spread(found: Sequence[Gates], most: int) -> list[Gates]:
    """At most so many, evenly; the first and the last are among them."""
    if len(found) <= most:
        return list(found)
    return [found[round(at * (len(found) - 1) / (most - 1))] for at in range(most)]


def gates_of(run: Run) -> GateHistory | None:
    """The gates of a run; None if there were none."""
    found = []
    for record in run.records:
        if record["kind"] in ("start", "epoch") and (one := _gates(record)) is not None:
            found.append(one)
    if not found:
        return None
    places = dict.fromkeys(place for one in found for place in one.awake)
    return GateHistory(tuple(found), tuple(places), _points(run.start))


def _gates(record: Record) -> Gates | None:
    gates = as_mapping(record.get("gates"))
    epoch = 0.0 if record["kind"] == "start" else as_number(record.get("epoch"))
    awake = {
        str(place): counts
        for place, bins in as_mapping(gates.get("axes")).items()
        if (counts := _numbers(bins, MOST_BINS)) is not None
    }
    if epoch is None or not awake:
        return None
    stage = gates.get("stage")
    asleep = {str(place): as_number(count) or 0.0 for place, count in as_mapping(gates.get("asleep")).items()}
    return Gates(
        epoch,
        STAGES[stage] if isinstance(stage, int) and 0 <= stage < len(STAGES) else "",
        as_number(gates.get("k")),
        awake,
        {place: max(0.0, count) for place, count in asleep.items()},
        _map(as_mapping(record.get("map"))),
        record,
    )


def _numbers(values: object, most: int) -> tuple[float, ...] | None:
    """Numbers of a list, none of them below zero; None if it is anything else."""
    if not isinstance(values, list) or not 1 <= len(values) <= most:
        return None
    found = [number for value in values if (number := as_number(value)) is not None and 0 <= number < LARGEST]
    return tuple(found) if len(found) == len(values) else None


def _map(record: Record) -> Map | None:
    rows = record.get("values")
    x, y = (_ends(record.get(side)) for side in ("x", "y"))
    if not isinstance(rows, list) or not 2 <= len(rows) <= MOST_COLUMNS or x is None or y is None:
        return None
    values = [row for one in rows if (row := _numbers(one, MOST_COLUMNS)) is not None]
    whole = len(values) == len(rows) and len(values[0]) > 1 and all(len(row) == len(values[0]) for row in values)
    return Map(x, y, tuple(values)) if whole and max(map(max, values)) <= 1 else None


def _ends(values: object) -> tuple[float, float] | None:
    if not isinstance(values, list) or len(values) != 2:
        return None
    low, high = map(as_number, values)
    return None if low is None or high is None or not low < high else (low, high)


def _points(start: Record) -> tuple[tuple[float, float, int], ...]:
    record = as_mapping(start.get("points"))
    inputs, labels = record.get("inputs"), record.get("labels")
    if not isinstance(inputs, list) or not isinstance(labels, list):
        return ()
    found = []
    every = max(1, -(-len(inputs) // MOST_POINTS))  # they may lie in order of their class
    for place, label in zip(inputs[::every], labels[::every], strict=False):
        x, y = map(as_number, place) if isinstance(place, list) and len(place) == 2 else (None, None)
        if x is not None and y is not None and label in (0, 1):
            found.append((x, y, int(label)))
    return tuple(found)


__all__ = ["GateHistory", "Gates", "Histogram", "Map", "gates_of", "spread"]
