"""Data sets: files in the published formats, good and bad, made on the spot; splits, normalisation, batches."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from espalier.bench import data
from espalier.bench.data import batches, load
from espalier.bench.fetch import Source, fetch
from espalier.bench.formats import read_cifar, read_idx, read_npz, read_svhn
from espalier.bench.text import Text
from espalier.errors import DataError


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def mirror(folder: Path, name: str, content: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return (folder / name).as_uri()


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_then_found(tmp_path: Path) -> None:
    url = mirror(tmp_path / "mirror", "a.bin", b"content")
    source = Source("a.bin", md5(b"content"), (url,))
    path = fetch(source, tmp_path / "cache")
    assert path == tmp_path / "cache" / "a.bin"
    (tmp_path / "mirror" / "a.bin").unlink()
    assert fetch(source, tmp_path / "cache").read_bytes() == b"content"


def test_a_failing_mirror_is_followed_by_the_next(tmp_path: Path) -> None:
    bad = mirror(tmp_path / "bad", "a.bin", b"something else")
    good = mirror(tmp_path / "good", "a.bin", b"content")
    gone = (tmp_path / "gone" / "a.bin").as_uri()
    assert fetch(Source("a.bin", md5(b"content"), (gone, bad, good)), tmp_path / "cache").read_bytes() == b"content"


def test_a_download_with_another_sum_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    url = mirror(tmp_path / "mirror", "a.bin", b"cut sho")
    with pytest.raises(DataError, match=f"expected md5 {md5(b'cut short')}, found {md5(b'cut sho')}"):
        fetch(Source("a.bin", md5(b"cut short"), (url,)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_offline_the_error_names_the_address_and_the_place(tmp_path: Path) -> None:
    url = (tmp_path / "nowhere" / "a.bin").as_uri()
    with pytest.raises(DataError) as caught:
        fetch(Source("a.bin", md5(b""), (url,)), tmp_path / "cache")
    assert url in str(caught.value)
    assert f"put it at {tmp_path / 'cache' / 'a.bin'}" in str(caught.value)


def test_a_damaged_file_in_the_cache_is_reported_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"damaged")
    with pytest.raises(DataError, match="Delete it"):
        fetch(Source("a.bin", md5(b"content"), ("file:///nowhere",)), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == b"damaged"


def test_a_recompressed_file_counts_as_the_published_one(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"content" * 99, compresslevel=1, mtime=0))
    source = Source("a.gz", md5(b"content" * 99), ("file:///nowhere",), unpacked=True)
    assert fetch(source, tmp_path) == tmp_path / "a.gz"
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"content" * 99, mtime=0)[:-9])
    with pytest.raises(DataError, match="not a whole gzip file"):
        fetch(source, tmp_path)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_idx_round_trip(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array), mtime=0))
    assert (read_idx(tmp_path / "a.gz") == array).all()


def packed(content: bytes) -> bytes:
    """gzip without the time of day, so that the same content gives the same bytes."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "not a whole gzip file"),
        (packed(idx(np.zeros(9, np.uint8)))[:-4], "not a whole gzip file"),
        (packed(b"\0\0\x0d\x01\0\0\0\x01\0"), "unsigned bytes"),
        (packed(b"\0"), "unsigned bytes"),
        (packed(idx(np.zeros(9, np.uint8))[:-1]), "should hold 17 bytes for shape .9,., but holds 16"),
        (packed(idx(np.zeros(9, np.uint8)) + b"x"), "holds 18"),
        (packed(b"\0\0\x08\x03\0\0\0\x01"), "should hold"),
    ],
    ids=["no gzip", "cut short", "floats", "too short", "one byte less", "one byte more", "no shape"],
)
def test_bad_idx_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "a.gz")


def cifar_archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def cifar_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    return pickle.dumps({"data": images, "labels": labels, "batch_label": "one", "filenames": ["a.png"]}, protocol=4)


def python2_cifar_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """The bytes that Python 2 and its numpy wrote, as in the published archives: byte strings, no ``_codecs``."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2
    dtype += b"K\x00tb"
    shape = b"".join(b"J" + struct.pack("<i", side) for side in images.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + shape + dtype + b"\x89" + text(images.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."


class Bomb:
    """Unpickled by the standard library, this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [cifar_pickle, python2_cifar_pickle])
def test_cifar_archives_of_both_pickle_dialects_are_read(
    tmp_path: Path, write: Callable[[np.ndarray, list[int]], bytes]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
    members = {
        "p/one": write(images[:2], [1, 0]),
        "p/two": write(images[2:4], [3, 2]),
        "p/test": write(images[4:], [5, 4]),
    }
    arrays = read_cifar(cifar_archive(tmp_path / "c.tar.gz", members), ["p/one", "p/two"], ["p/test"], "labels")
    assert (arrays.x_train == images[:4].reshape(4, 3, 32, 32)).all()
    assert arrays.y_train.tolist() == [1, 0, 3, 2]
    assert arrays.y_test.tolist() == [5, 4]


def test_pickles_cannot_run_code(tmp_path: Path) -> None:
    trap = tmp_path / "created-by-the-pickle"
    content = pickle.dumps({"data": Bomb(trap), "labels": []})
    with pytest.raises(DataError, match=r"refused to unpickle \w+\.mkdir"):
        read_cifar(
            cifar_archive(tmp_path / "c.tar.gz", {"train": content, "test": content}), ["train"], ["test"], "labels"
        )
    assert not trap.exists()
    pickle.loads(content)
    assert trap.exists(), "the bomb works where nothing holds it back"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable pickle"),
        (cifar_pickle(np.zeros((2, 3072), np.uint8), [0, 1])[:-700], "not a readable pickle"),
        (pickle.dumps([1, 2]), "should be a dict with 'data' and 'labels'"),
        (pickle.dumps({"data": 1}), "should be a dict with 'data' and 'labels'"),
        (cifar_pickle(np.zeros((2, 3071), np.uint8), [0, 1]), r"shape \(N, 3072\), found uint8 of shape \(2, 3071\)"),
        (cifar_pickle(np.zeros((2, 3072)), [0, 1]), "found float64"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": "01"}, protocol=4), "a list of integers"),
    ],
)
def test_bad_cifar_members_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    archive = cifar_archive(tmp_path / "c.tar.gz", {"train": content, "test": content})
    with pytest.raises(DataError, match=message):
        read_cifar(archive, ["train"], ["test"], "labels")


def test_bad_cifar_archives_are_refused(tmp_path: Path) -> None:
    whole = cifar_archive(tmp_path / "c.tar.gz", {"train": os.urandom(5000)}).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"not a whole \.tar\.gz archive"):
        read_cifar(tmp_path / "cut.tar.gz", ["train"], ["test"], "labels")
    images = np.zeros((1, 3072), np.uint8)
    lacking = cifar_archive(tmp_path / "lacking.tar.gz", {"train": cifar_pickle(images, [0])})
    with pytest.raises(DataError, match=r"lacks a member.*'test'"):
        read_cifar(lacking, ["train"], ["test"], "labels")


def svhn_file(path: Path, count: int) -> Path:
    from scipy.io import savemat

    images = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    savemat(path, {"X": images, "y": (np.arange(count) % 10 + 1).reshape(-1, 1).astype(np.uint8)})
    return path


def test_svhn_images_come_first_by_number_and_ten_means_zero(tmp_path: Path) -> None:
    x, y = read_svhn(svhn_file(tmp_path / "a.mat", 12))
    expected = np.random.default_rng(12).integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
    assert (x[7] == expected[..., 7]).all()
    assert y.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


def test_bad_svhn_files_are_refused(tmp_path: Path) -> None:
    from scipy.io import savemat

    whole = svhn_file(tmp_path / "a.mat", 12).read_bytes()
    (tmp_path / "cut.mat").write_bytes(whole[:2000])
    with pytest.raises(DataError, match="not a readable MAT file"):
        read_svhn(tmp_path / "cut.mat")
    savemat(tmp_path / "b.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.zeros((3, 1), np.uint8)})
    with pytest.raises(DataError, match="should be 2 integers"):
        read_svhn(tmp_path / "b.mat")
    savemat(tmp_path / "c.mat", {"y": np.zeros(3)})
    with pytest.raises(DataError, match="found NoneType"):
        read_svhn(tmp_path / "c.mat")


# --- .npz -------------------------------------------------------------------------------------------------------------


def good_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8),
        "y_train": np.arange(40) % 4,
        "x_test": rng.integers(0, 256, (8, 6, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }


def saved(path: Path, **changed: np.ndarray) -> Path:
    np.savez(path / "set.npz", **{**good_arrays(), **changed})
    return path / "set.npz"


def test_npz_images_become_normalised_channels_first(tmp_path: Path) -> None:
    found = load(saved(tmp_path), seed=3, validation=0.2)
    assert (found.name, found.classes, found.input_shape) == ("set", 4, (3, 6, 5))
    assert (found.x_train.dtype, found.y_train.dtype) == (torch.float32, torch.int64)
    assert len(found.x_train) == 32
    assert len(found.x_val) == 8
    kept = [found.x_train.double().mean(dim=(0, 2, 3)), found.x_train.double().std(dim=(0, 2, 3), correction=0)]
    assert torch.allclose(kept[0], torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(kept[1], torch.ones(3, dtype=torch.float64), atol=1e-6)
    # the test set is carried by the same map: undo it on the first channel and compare
    raw = torch.from_numpy(good_arrays()["x_test"][..., 0]).double()
    slope = (found.x_test[0, 0, 0, 0] - found.x_test[1, 0, 0, 0]).double() / (raw[0, 0, 0] - raw[1, 0, 0])
    offset = found.x_test[0, 0, 0, 0].double() - slope * raw[0, 0, 0]
    assert torch.allclose(found.x_test[:, 0].double(), slope * raw + offset, atol=1e-4)


def test_normalisation_never_looks_at_test_or_validation_data(tmp_path: Path) -> None:
    before = load(saved(tmp_path), seed=0)
    after = load(saved(tmp_path, x_test=np.full((8, 6, 5, 3), 255, np.uint8)), seed=0)
    assert torch.equal(before.x_train, after.x_train)
    assert torch.equal(before.x_val, after.x_val)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((40, 6, 5), (1, 6, 5)),
        ((40, 6, 5, 1), (1, 6, 5)),
        ((40, 6, 5, 3), (3, 6, 5)),
        ((40, 3, 6, 5), (3, 6, 5)),
        ((40, 4, 6, 6), (4, 6, 6)),
        ((40, 7), (7,)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int32, np.float16])
def test_layouts_are_recognised(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...], dtype: type) -> None:
    x = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    found = load(saved(tmp_path, x_train=x, x_test=x[:8]))
    assert found.input_shape == expected
    assert found.x_test.is_contiguous()


def test_channels_last_and_channels_first_give_the_same(tmp_path: Path) -> None:
    x = good_arrays()["x_train"]
    last = load(saved(tmp_path))
    first = load(saved(tmp_path, x_train=np.moveaxis(x, 3, 1), x_test=np.moveaxis(good_arrays()["x_test"], 3, 1)))
    assert torch.equal(last.x_train, first.x_train)
    assert torch.equal(last.x_test, first.x_test)


def test_constant_features_stay_near_zero(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    x[:, 1] = 0.1
    found = load(saved(tmp_path, x_train=x, x_test=x[:8]))
    assert found.x_train[:, 1].abs().max() < 1e-6
    assert found.x_train[:, 0].std(correction=0) == pytest.approx(1, abs=1e-5)


def nan_images() -> np.ndarray:
    images = np.zeros((40, 6, 5, 3), np.float32)
    images[3, 2, 1, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": nan_images()}, "x_train holds NaN or infinity"),
        ({"x_test": np.full((8, 6, 5, 3), np.inf)}, "x_test holds NaN or infinity"),
        ({"x_train": np.full((40, 6, 5, 3), 1e300)}, "beyond the range of 32-bit floats"),
        ({"x_train": np.zeros((40, 6, 5, 3), complex)}, "should hold real numbers, found complex128"),
        ({"x_train": np.full((40, 2), "text")}, "should hold real numbers, found <U4"),
        ({"x_train": np.zeros(40)}, r"vectors \(N, F\) or images"),
        ({"x_train": np.zeros((0, 6, 5, 3))}, r"found shape \(0, 6, 5, 3\)"),
        ({"x_train": np.zeros((40, 3, 6, 3))}, "found both"),
        ({"x_train": np.zeros((40, 6, 5, 7))}, "found neither"),
        ({"x_test": np.zeros((8, 7, 5, 3))}, r"differ in the shape of one input: \(3, 6, 5\) and \(3, 7, 5\)"),
        ({"y_train": np.arange(39) % 4}, r"y_train should have shape \(40,\), one label per input, found \(39,\)"),
        ({"y_test": np.zeros((8, 4), int)}, r"y_test should have shape \(8,\)"),
        ({"y_train": np.arange(40) / 4}, "should hold integers 0..K-1, found float64"),
        ({"y_train": np.arange(40) % 4 - 1}, "should hold integers 0..K-1, found -1"),
        ({"y_train": np.arange(40) % 4 * 2}, r"y_train has no \[1, 3, 5\]; renumber them"),
        ({"y_test": np.arange(8)}, "y_test has the label 7, but y_train only has 0..3"),
        ({"y_train": np.array([object()] * 40)}, "not a readable .npz file of plain arrays"),
    ],
)
# numpy warns of the overflow that the error then explains
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_bad_arrays_are_refused(tmp_path: Path, changed: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(saved(tmp_path, **changed))


def test_bad_npz_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "none.npz")
    whole = saved(tmp_path).read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:200] + bytes(200) + whole[400:], pickle.dumps({})):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(DataError, match=r"not a readable \.npz file"):
            read_npz(tmp_path / "bad.npz")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="holds one array"):
        read_npz(tmp_path / "single.npz")
    np.savez(tmp_path / "few.npz", x_train=np.zeros((4, 2)), y_train=np.zeros(4, int))
    with pytest.raises(DataError, match="lacks x_test, y_test"):
        read_npz(tmp_path / "few.npz")


def test_a_pickled_object_in_an_npz_file_is_never_built(tmp_path: Path) -> None:
    trap = tmp_path / "created-by-the-pickle"
    content = {**good_arrays(), "y_train": np.array([Bomb(trap)] * 40, dtype=object)}
    np.savez(tmp_path / "set.npz", **content)
    with pytest.raises(DataError, match="plain arrays"):
        load(tmp_path / "set.npz")
    assert not trap.exists()


def test_a_set_in_one_piece_is_split_by_class_whatever_the_seed(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(200, 2))
    labels = np.repeat([0, 1], 100)
    np.savez(tmp_path / "set.npz", points=points, labels=labels, embedding=np.zeros((2, 100)))
    found, again = (load(tmp_path / "set.npz", seed=seed) for seed in (0, 1))
    assert (len(found.y_train), len(found.y_val), len(found.y_test)) == (108, 12, 80)
    assert found.y_test.bincount().tolist() == [40, 40]
    assert torch.equal(found.y_test, again.y_test)
    everything = torch.cat([found.x_train, found.x_val, found.x_test])
    assert len(everything.unique(dim=0)) == 200
    np.savez(tmp_path / "bad.npz", points=points, labels=labels[:-1])
    with pytest.raises(DataError, match=r"labels should be one integer per point, found int64 of shape \(199,\)"):
        load(tmp_path / "bad.npz")


# --- named sets -------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(DataError, match="unknown data set 'mnits': expected one of digits, moons, mnist, cifar10"):
        load("mnits")


@pytest.mark.parametrize("validation", [0.0, 1.0, -0.5, float("nan")])
def test_the_validation_fraction_is_checked(validation: float) -> None:
    with pytest.raises(DataError, match="expected 0 < v < 1"):
        load("moons", validation=validation)


def test_too_few_samples_for_validation_are_refused(tmp_path: Path) -> None:
    x, y = np.eye(4), np.arange(4)
    with pytest.raises(DataError, match="leaves nothing for validation"):
        load(saved(tmp_path, x_train=x, y_train=y, x_test=x, y_test=y))


def test_digits_are_split_by_class_and_the_test_set_does_not_depend_on_the_seed() -> None:
    one, other = load("digits", seed=0), load("digits", seed=1)
    assert len(one.x_train) + len(one.x_val) + len(one.x_test) == 1797
    assert one.input_shape == (1, 8, 8)
    assert one.classes == 10
    assert torch.equal(one.y_test, other.y_test)
    assert not torch.equal(one.x_val, other.x_val)
    for labels in (one.y_train, one.y_val, one.y_test):
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert (shares - 0.1).abs().max() < 0.012
    pixels = torch.cat([one.x_train, one.x_val, one.x_test]).flatten(1)
    assert len(pixels.unique(dim=0)) == 1797, "no image is in two parts"


def test_the_same_seed_gives_the_same_split() -> None:
    one, other = load("moons", seed=5), load("moons", seed=5)
    assert torch.equal(one.x_val, other.x_val)
    assert torch.equal(one.x_train, other.x_train)


def test_without_scikit_learn_digits_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'espalier\[demo\]'"):
        load("digits")


def test_moons_are_two_half_circles() -> None:
    found = load("moons")
    assert (len(found.x_train), len(found.x_val), len(found.x_test)) == (450, 50, 500)
    assert torch.bincount(found.y_test).tolist() == [250, 250]
    # by its nearest training points a moon is known nearly always; by a straight line it is not
    nearest = torch.cdist(found.x_test, found.x_train).topk(5, largest=False).indices
    votes = found.y_train[nearest].float().mean(dim=1)
    assert ((votes > 0.5).long() == found.y_test).float().mean() > 0.99
    line = torch.linalg.lstsq(
        torch.cat([found.x_train, torch.ones(450, 1)], dim=1), 2.0 * found.y_train[:, None] - 1
    ).solution
    side = torch.cat([found.x_test, torch.ones(500, 1)], dim=1) @ line > 0
    assert (side[:, 0].long() == found.y_test).float().mean() < 0.95


def test_mnist_comes_from_four_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sources = []
    for name, array in {
        "xa": rng.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        "ya": (np.arange(60) % 10).astype(np.uint8),
        "xb": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "yb": (np.arange(20) % 10).astype(np.uint8),
    }.items():
        url = mirror(tmp_path / "mirror", f"{name}.gz", gzip.compress(idx(array), mtime=0))
        sources.append(Source(f"{name}.gz", md5(idx(array)), (url,), unpacked=True))
    monkeypatch.setattr(data, "_MNIST", tuple(sources))
    monkeypatch.setenv("ESPALIER_DATA", str(tmp_path / "cache"))
    found = load("mnist", validation=0.2)
    assert found.x_train.shape == (50, 1, 28, 28)
    assert found.x_test.shape == (20, 1, 28, 28)
    assert (tmp_path / "cache" / "mnist" / "xa.gz").is_file()


def test_cifar_and_svhn_come_from_their_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    labels = [number % 10 for number in range(20)]
    (tmp_path / "mirror").mkdir()
    batch = cifar_pickle(images, labels)
    names = [*(f"cifar-10-batches-py/data_batch_{part}" for part in range(1, 6)), "cifar-10-batches-py/test_batch"]
    ten = cifar_archive(tmp_path / "mirror" / "ten.tar.gz", dict.fromkeys(names, batch))
    fine = pickle.dumps({"data": images, "fine_labels": [*range(20)], "coarse_labels": [0] * 20}, protocol=4)
    hundred = cifar_archive(
        tmp_path / "mirror" / "hundred.tar.gz", {"cifar-100-python/train": fine, "cifar-100-python/test": fine}
    )
    mats = [svhn_file(tmp_path / "mirror" / f"{count}.mat", count) for count in (40, 20)]

    def source(path: Path) -> Source:
        return Source(path.name, md5(path.read_bytes()), (path.as_uri(),))

    monkeypatch.setattr(data, "_CIFAR10", source(ten))
    monkeypatch.setattr(data, "_CIFAR100", source(hundred))
    monkeypatch.setattr(data, "_SVHN", tuple(map(source, mats)))
    found = load("cifar10", root=tmp_path / "cache")
    assert (len(found.x_train) + len(found.x_val), len(found.x_test), found.classes) == (100, 20, 10)
    assert found.input_shape == (3, 32, 32)
    with pytest.raises(DataError, match="leaves nothing for validation"):
        load("cifar100", root=tmp_path / "cache")
    svhn = load("svhn", root=tmp_path / "cache", validation=0.3)
    assert (len(svhn.x_train), len(svhn.x_test), svhn.classes, svhn.input_shape) == (30, 20, 10, (3, 32, 32))


def test_real_mnist(real_data: Path) -> None:
    found = load("mnist", root=real_data)
    assert len(found.x_train) + len(found.x_val) == 60_000
    assert torch.bincount(found.y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_real_cifar_images(real_data: Path) -> None:
    found = load(real_data / "cifar10-jpeg.npz")
    assert found.x_train.shape == (45_000, 3, 32, 32)
    assert torch.bincount(found.y_test).tolist() == [1000] * 10
    assert found.x_train.mean(dim=(2, 3)).mean(dim=0).abs().max() < 1e-4


# --- batches ----------------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 60), size=st.integers(1, 70), shuffled=st.booleans())
def test_batches_hold_every_sample_once_in_equal_sizes(count: int, size: int, shuffled: bool) -> None:
    x, y = torch.arange(count).float()[:, None], torch.arange(count)
    generator = torch.Generator().manual_seed(0) if shuffled else None
    found = list(batches(x, y, size, generator))
    sizes = [len(labels) for _, labels in found]
    assert len(found) == -(-count // size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= size
    assert all(torch.equal(inputs[:, 0].long(), labels) for inputs, labels in found)
    order = torch.cat([labels for _, labels in found]).tolist()
    assert sorted(order) == list(range(count))
    assert shuffled or order == list(range(count))


def test_batches_repeat_with_the_generator_and_differ_between_epochs() -> None:
    x, y = torch.arange(50).float()[:, None], torch.arange(50)
    generator = torch.Generator().manual_seed(1)
    epochs = [torch.cat([labels for _, labels in batches(x, y, 8, generator)]) for _ in range(2)]
    again = torch.cat([labels for _, labels in batches(x, y, 8, torch.Generator().manual_seed(1))])
    assert torch.equal(epochs[0], again)
    assert not torch.equal(epochs[0], epochs[1])


def test_wrong_batch_arguments_are_refused() -> None:
    x, y = torch.zeros(3, 1), torch.zeros(3)
    with pytest.raises(DataError, match="got size=0"):
        list(batches(x, y, 0))
    with pytest.raises(DataError, match="give batches"):
        list(batches(x, y, 1, augment=lambda images, generator: images))


def test_data_move_to_another_device_together() -> None:
    moved = load("moons").to("meta")
    assert {part.device.type for part in (moved.x_train, moved.y_val, moved.x_test, moved.y_test)} == {"meta"}
    assert moved.classes == 2


def test_text_is_cut_into_sequences_with_what_comes_next(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(97 + number * number % 23) for number in range(64 * 40 + 5))
    monkeypatch.setattr(data, "DATASETS", {"tinyshakespeare": lambda folder: Text(text)})
    found = load("tinyshakespeare", seed=3)
    assert found.classes == len(set(text))
    assert [len(part) for part in (found.x_train, found.x_val, found.x_test)] == [32, 4, 4]
    assert found.example.dtype == torch.int64
    for x, y in ((found.x_train, found.y_train), (found.x_val, found.y_val), (found.x_test, found.y_test)):
        assert torch.equal(x[:, 1:], y[:, :-1])
    known = sorted(set(text))
    assert "".join(known[code] for code in found.x_test.flatten().tolist()) == text[64 * 36 : 64 * 40]
    assert not torch.equal(load("tinyshakespeare", seed=4).x_val, found.x_val)
