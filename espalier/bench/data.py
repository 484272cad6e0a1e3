"""Data sets for tasks and benchmarks: loaded, checked, split, normalised; and the batches that training reads.

Images become float32 (N, C, H, W), vectors float32 (N, F), labels int64 in 0..K-1; text becomes int64 (N, T), with
labels of the same shape. Validation data are split off the
training set, stratified by class; the test set is only carried along.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from espalier.bench.augment import Augment
from espalier.bench.fetch import Source, fetch
from espalier.bench.formats import Array, Arrays, read_cifar, read_idx, read_npz, read_svhn
from espalier.bench.text import Text, tinyshakespeare
from espalier.errors import DataError

CHANNEL_COUNTS = (1, 3, 4)

# which images of a set that was published in one piece are for testing belongs to the set, not to the run
_PUBLISHED_IN_ONE_PIECE = 0
_TESTED_IN_ONE_PIECE = 0.4


@dataclass(frozen=True, eq=False)
class Dataset:
    """Normalised inputs (N, *input_shape) and labels (N,) in 0..classes-1, for training, validation and test; of text
    characters (N, T) and those that come next."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input: (C, H, W) for images, (F,) for vectors, (T,) for text."""
        return tuple(self.x_train.shape[1:])

    @property
    def example(self) -> Tensor:
        """Inputs to attach with: two samples of zeros, since batch norm cannot train on one."""
        return self.x_train.new_zeros(2, *self.input_shape)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data on another device."""
        return replace(
            self,
            x_train=self.x_train.to(device),
            y_train=self.y_train.to(device),
            x_val=self.x_val.to(device),
            y_val=self.y_val.to(device),
            x_test=self.x_test.to(device),
            y_test=self.y_test.to(device),
        )


def load(name: str | Path, *, root: Path | None = None, seed: int = 0, validation: float = 0.1) -> Dataset:
    """Load a data set by its name in ``DATASETS``, or from the path of an ``.npz`` file with the arrays ``x_train``,
    ``y_train``, ``x_test`` and ``y_test``, or with ``points`` and ``labels``, of which fixed 40% of every class test.

    Public files are looked for in, and downloaded to, a folder of the set's name inside ``root`` (default: the
    environment variable ESPALIER_DATA, else ``~/.cache/espalier``). ``seed`` chooses the fraction ``validation`` of
    every class that is split off the training set; normalisation uses the statistics of what is left.

    Raises:
        DataError: unknown name, files missing while offline, damaged files, or arrays that are not as documented.
    """
    if not 0 < validation < 1:
        raise DataError(f"validation is the fraction split off the training set: expected 0 < v < 1, got {validation}")
    arrays: Arrays | Text
    if Path(name).suffix == ".npz":
        title, arrays = Path(name).stem, _from_file(Path(name))
    elif isinstance(name, str) and name in DATASETS:
        title, arrays = name, DATASETS[name]((root or default_root()) / name)
    else:
        raise DataError(f"unknown data set '{name}': expected one of {', '.join(DATASETS)}, or the path of a .npz file")
    return _prepare(title, arrays, seed, validation)


def default_root() -> Path:
    """The folder of downloaded data: the environment variable ESPALIER_DATA, else ``~/.cache/espalier``."""
    chosen = os.environ.get("ESPALIER_DATA")
    return Path(chosen) if chosen else Path.home() / ".cache" / "espalier"


def batches(
    x: Tensor, y: Tensor, size: int, generator: torch.Generator | None = None, augment: Augment | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass over ``x`` and ``y`` in ``ceil(N / size)`` batches of equal size up to one, on their own device.

    With a generator the order is random, and ``augment`` changes the inputs of each batch; without one, data come in
    order and as they are. Equal sizes leave no tiny last batch, which batch norm could not use.
    """
    if size < 1:
        raise DataError(f"a batch holds at least 1 sample, got size={size}")
    if augment is not None and generator is None:
        raise DataError("augmentation draws random numbers: give batches() a generator too")
    count = math.ceil(len(x) / size)
    if generator is None:
        yield from zip(x.tensor_split(count), y.tensor_split(count), strict=True)
        return
    order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
    for chosen in order.tensor_split(count):
        inputs = x[chosen]
        yield (inputs if augment is None else augment(inputs, generator)), y[chosen]


def _prepare(name: str, arrays: Arrays | Text, seed: int, validation: float) -> Dataset:
    """Check, bring into the documented form, split and normalise."""
    if isinstance(arrays, Text):
        parts, characters = arrays.sequences(seed, validation)
        (x, y), (x_val, y_val), (x_last, y_last) = (
            (part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts
        )
        return Dataset(name, x, y, x_val, y_val, x_last, y_last, characters)
    x_train, x_test = _inputs(name, "x_train", arrays.x_train), _inputs(name, "x_test", arrays.x_test)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"{name}: x_train and x_test differ in the shape of one input: "
            f"{tuple(x_train.shape[1:])} and {tuple(x_test.shape[1:])}"
        )
    y_train = _labels(name, "y_train", arrays.y_train, len(x_train))
    y_test = _labels(name, "y_test", arrays.y_test, len(x_test))
    classes = int(y_train.max()) + 1
    absent = sorted(set(range(classes)) - set(y_train.tolist()))
    if absent:
        raise DataError(f"{name}: labels must be 0..K-1 without gaps, but y_train has no {absent[:5]}; renumber them")
    if int(y_test.max()) >= classes:
        raise DataError(f"{name}: y_test has the label {int(y_test.max())}, but y_train only has 0..{classes - 1}")
    held_out = torch.from_numpy(_stratified(y_train.numpy(), validation, seed))
    if not held_out.any():
        raise DataError(f"{name}: {validation:.0%} of {len(x_train)} training samples leaves nothing for validation")
    x_train, y_train, x_val, y_val = x_train[~held_out], y_train[~held_out], x_train[held_out], y_train[held_out]
    x_train, x_val, x_test = _normalise(x_train, x_val, x_test)
    return Dataset(name, x_train, y_train, x_val, y_val, x_test, y_test, classes)


def _inputs(name: str, key: str, array: Array) -> Tensor:
    """Numbers of shape (N, F), or images (N, C, H, W) from NHW, NHWC or NCHW; still in their own type."""
    what = f"{name}: {key}"
    if array.dtype.kind not in "buif":
        raise DataError(f"{what} should hold real numbers, found {array.dtype}")
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise DataError(f"{what} should be vectors (N, F) or images (N, H, W[, C]), found shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{what} holds NaN or infinity: remove or replace those values")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4:
        first, last = array.shape[1] in CHANNEL_COUNTS, array.shape[3] in CHANNEL_COUNTS
        if first == last:
            raise DataError(
                f"{what} of shape {array.shape} should have its channels ({', '.join(map(str, CHANNEL_COUNTS))}) "
                f"in either the second or the last place, found {'both' if first else 'neither'}"
            )
        array = array if first else np.moveaxis(array, 3, 1)
    narrow = array if array.dtype == np.uint8 else array.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise DataError(f"{what} holds values beyond the range of 32-bit floats: rescale them")
    return torch.from_numpy(np.require(narrow, requirements=["C", "W"]))


def _labels(name: str, key: str, array: Array, count: int) -> Tensor:
    if array.dtype.kind not in "iu":
        raise DataError(f"{name}: {key} should hold integers 0..K-1, found {array.dtype}")
    if array.shape not in ((count,), (count, 1)):
        raise DataError(f"{name}: {key} should have shape ({count},), one label per input, found {array.shape}")
    if int(array.min()) < 0:
        raise DataError(f"{name}: {key} should hold integers 0..K-1, found {int(array.min())}")
    return torch.from_numpy(array.reshape(-1).astype(np.int64))


def _stratified(labels: Array, fraction: float, seed: int) -> Array:
    """A mask (N,) that picks ``fraction`` of every class at random, but never a whole class."""
    rng = np.random.default_rng(seed)
    picked = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        picked[members[: min(round(len(members) * fraction), len(members) - 1)]] = True
    return picked


def _normalise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Subtract mean, divide by deviation, per channel of images or per feature of vectors, all as in ``train``."""
    parts = [part.float() for part in (train, *others)]
    mean = _per_channel(parts[0]).mean(dim=2).mean(dim=0)
    for part in parts:
        _per_channel(part).sub_(mean[:, None])
    # two steps over contiguous memory are many times faster than one reduction over dimensions 0, 2 and 3
    deviation = torch.linalg.vector_norm(_per_channel(parts[0]), dim=2).square().mean(dim=0).sqrt()
    deviation /= math.sqrt(_per_channel(parts[0]).shape[2])
    # a constant channel (a pixel that is always black, say) carries nothing but rounding: leave it near zero
    deviation[deviation <= 1e-6 * mean.abs()] = 1
    for part in parts:
        _per_channel(part).div_(deviation[:, None])
    return parts


def _per_channel(x: Tensor) -> Tensor:
    """A view (N, channels or features, pixels or 1)."""
    return x.view(*x.shape[:2], -1)


def _from_file(path: Path) -> Arrays:
    found = read_npz(path)
    if "points" not in found:
        return Arrays(**found)
    points, labels = found["points"], found["labels"]
    if labels.dtype.kind not in "iu" or labels.shape != (len(points),):
        raise DataError(
            f"{path}: labels should be one integer per point, found {labels.dtype} of shape {labels.shape} for points "
            f"of shape {points.shape}"
        )
    test = _stratified(labels, _TESTED_IN_ONE_PIECE, _PUBLISHED_IN_ONE_PIECE)
    return Arrays(points[~test], labels[~test], points[test], labels[test])


def _digits(folder: Path) -> Arrays:
    """1,797 images 8x8 that scikit-learn carries; a fixed fifth of every class is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set 'digits' comes with scikit-learn: pip install 'espalier[demo]'") from error
    bunch = load_digits()
    x, y = np.asarray(bunch.images), np.asarray(bunch.target)
    test = _stratified(y, 0.2, _PUBLISHED_IN_ONE_PIECE)
    return Arrays(x[~test], y[~test], x[test], y[test])


def _moons(folder: Path) -> Arrays:
    """1,000 points on two interleaved half circles, with Gaussian noise of 0.1; every second point of a moon tests."""
    rng = np.random.default_rng(_PUBLISHED_IN_ONE_PIECE)
    angle = np.linspace(0, np.pi, 500)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
    x = np.concatenate([upper, lower]) + rng.normal(0, 0.1, (1000, 2))
    y = np.repeat([0, 1], 500)
    return Arrays(x[::2], y[::2], x[1::2], y[1::2])


def _mnist(folder: Path) -> Arrays:
    x_train, y_train, x_test, y_test = (read_idx(fetch(source, folder)) for source in _MNIST)
    return Arrays(x_train, y_train, x_test, y_test)


def _cifar10(folder: Path) -> Arrays:
    inside = "cifar-10-batches-py"
    train = [f"{inside}/data_batch_{part}" for part in range(1, 6)]
    return read_cifar(fetch(_CIFAR10, folder), train, [f"{inside}/test_batch"], "labels")


def _cifar100(folder: Path) -> Arrays:
    inside = "cifar-100-python"
    return read_cifar(fetch(_CIFAR100, folder), [f"{inside}/train"], [f"{inside}/test"], "fine_labels")


def _svhn(folder: Path) -> Arrays:
    train, test = (read_svhn(fetch(source, folder)) for source in _SVHN)
    return Arrays(*train, *test)


def _mnist_source(filename: str, md5: str) -> Source:
    mirrors = ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist")
    return Source(filename, md5, tuple(f"{mirror}/{filename}" for mirror in mirrors), unpacked=True)


def _single_source(site: str, filename: str, md5: str) -> Source:
    return Source(filename, md5, (f"{site}/{filename}",))


_MNIST = (
    _mnist_source("train-images-idx3-ubyte.gz", "6bbc9ace898e44ae57da46a324031adb"),
    _mnist_source("train-labels-idx1-ubyte.gz", "a25bea736e30d166cdddb491f175f624"),
    _mnist_source("t10k-images-idx3-ubyte.gz", "2646ac647ad5339dbf082846283269ea"),
    _mnist_source("t10k-labels-idx1-ubyte.gz", "27ae3e4e09519cfbb04c329615203637"),
)
_TORONTO = "https://www.cs.toronto.edu/~kriz"
_CIFAR10 = _single_source(_TORONTO, "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
_CIFAR100 = _single_source(_TORONTO, "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85")
_STANFORD = "http://ufldl.stanford.edu/housenumbers"
_SVHN = (
    _single_source(_STANFORD, "train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
    _single_source(_STANFORD, "test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
)

DATASETS: Mapping[str, Callable[[Path], Arrays | Text]] = MappingProxyType(
    {
        "digits": _digits,
        "moons": _moons,
        "mnist": _mnist,
        "cifar10": _cifar10,
        "cifar100": _cifar100,
        "svhn": _svhn,
        "tinyshakespeare": tinyshakespeare,
    }
)
