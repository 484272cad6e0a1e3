"""Readers of the file formats of public data sets, into plain numpy arrays. Files are data: none can run code."""

import gzip
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from espalier.errors import DataError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Arrays:
    """What every reader returns: images or vectors and their labels, as stored, unchecked."""

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array


def read_idx(path: Path) -> Array:
    """An unsigned-byte array from a gzipped IDX file (the format of MNIST).

    Raises:
        DataError: not an IDX file of unsigned bytes, or cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}). Download it again") from error
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes: it should start with 00 00 08, not {raw[:3]!r}")
    start = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4))
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(raw) != expected:
        raise DataError(f"{path} should hold {expected} bytes for shape {shape}, but holds {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, strings, lists, dicts and numpy arrays, and refuses to look up anything else."""

    _ALLOWED: Mapping[tuple[str, str], Any] = {
        # the function by which numpy rebuilds arrays has moved between versions; an array tells where it is now
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise DataError(
                f"refused to unpickle {module}.{name}: only arrays, lists and strings belong here"
            ) from None


def read_cifar(path: Path, train: Sequence[str], test: Sequence[str], label_key: str) -> Arrays:
    """CIFAR images (N, 3, 32, 32) from the "python version" archive; ``train`` and ``test`` name its members.

    Raises:
        DataError: the archive is damaged, lacks a member, or a member holds anything but the documented arrays.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            parts = {name: _cifar_batch(archive, name, label_key) for name in (*train, *test)}
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole .tar.gz archive ({error}). Download it again") from error
    except KeyError as error:
        raise DataError(f"{path} lacks a member: {error.args[0]}. Is it the right archive?") from error
    return Arrays(
        x_train=np.concatenate([parts[name][0] for name in train]),
        y_train=np.concatenate([parts[name][1] for name in train]),
        x_test=np.concatenate([parts[name][0] for name in test]),
        y_test=np.concatenate([parts[name][1] for name in test]),
    )


def _cifar_batch(archive: tarfile.TarFile, name: str, label_key: str) -> tuple[Array, Array]:
    member = archive.extractfile(name)
    if member is None:
        raise DataError(f"{name} in the archive is not a file")
    try:
        # latin1 is what Python 3 needs to read arrays that Python 2 pickled
        batch = _ArrayUnpickler(BytesIO(member.read()), encoding="latin1").load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{name} in the archive is not a readable pickle ({error})") from error
    if not isinstance(batch, dict) or not {"data", label_key} <= batch.keys():
        raise DataError(f"{name} in the archive should be a dict with 'data' and '{label_key}'")
    data, labels = batch["data"], batch[label_key]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise DataError(f"'data' of {name} should be unsigned bytes of shape (N, 3072), found {_describe(data)}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"'{label_key}' of {name} should be a list of integers")
    return data.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def read_svhn(path: Path) -> tuple[Array, Array]:
    """SVHN images (N, 32, 32, 3) and labels 0..9 from one of its ``.mat`` files, where the digit 0 is labelled 10.

    Raises:
        DataError: scipy is missing, or the file is damaged or does not hold the documented arrays.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError("reading SVHN needs scipy: pip install scipy") from error
    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # scipy documents no set of errors for damaged files
        raise DataError(f"{path} is not a readable MAT file ({error}). Download it again") from error
    x, y = content.get("X"), content.get("y")
    if not isinstance(x, np.ndarray) or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
        raise DataError(f"'X' in {path} should have shape (32, 32, 3, N), found {_describe(x)}")
    if not isinstance(y, np.ndarray) or y.size != x.shape[3] or y.dtype.kind not in "iu":
        raise DataError(f"'y' in {path} should be {x.shape[3]} integers, found {_describe(y)}")
    return np.moveaxis(x, 3, 0), y.reshape(-1).astype(np.int64) % 10


IN_TWO_PARTS = ("x_train", "y_train", "x_test", "y_test")
IN_ONE_PIECE = ("points", "labels")


def read_npz(path: Path) -> Mapping[str, Array]:
    """The arrays of an ``.npz`` file that are named in IN_TWO_PARTS, or else those in IN_ONE_PIECE; never unpickles.

    Raises:
        DataError: no such file, not an ``.npz`` file, cut short, an array missing, or arrays of Python objects.
    """
    try:
        # opened here, because numpy leaves files open that it cannot read
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise DataError(
                    f"{path} holds one array; write it with numpy.savez and the arrays {', '.join(IN_TWO_PARTS)}"
                )
            names = IN_ONE_PIECE if set(IN_ONE_PIECE) <= set(file.files) else IN_TWO_PARTS
            missing = [name for name in names if name not in file.files]
            if missing:
                raise DataError(
                    f"{path} lacks {', '.join(missing)}: expected {', '.join(IN_TWO_PARTS)}, or "
                    f"{' and '.join(IN_ONE_PIECE)} of a set in one piece, found {file.files}"
                )
            return {name: file[name] for name in names}
    except FileNotFoundError as error:
        raise DataError(f"no such file: {path}") from error
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz file of plain arrays ({error})") from error


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__
