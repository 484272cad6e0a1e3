"""Files of public data sets: found in a folder or downloaded from a mirror, and checked before anything reads them."""

import gzip
import hashlib
import os
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from espalier.errors import DataError

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Source:
    """One published file: its name, the md5 sum of its content, and the addresses that offer it, best first.

    ``unpacked`` means that the sum is that of the content inside a ``.gz`` file, which stays the same when a mirror
    compresses it anew.
    """

    filename: str
    md5: str
    urls: tuple[str, ...]
    unpacked: bool = False


def fetch(source: Source, folder: Path) -> Path:
    """The path of a file that holds exactly what was published, downloaded into ``folder`` if it is not there yet.

    Raises:
        DataError: a file is there but differs, or no mirror delivered it; the message names addresses and place.
    """
    target = folder / source.filename
    if target.is_file():
        found = _md5(target, source.unpacked)
        if found != source.md5:
            raise DataError(
                f"{target} is not the published file: expected md5 {source.md5}, found {found}. "
                f"Delete it so that it is downloaded again, or replace it by a good copy of {source.urls[0]}"
            )
        return target
    failures = []
    for url in source.urls:
        try:
            _download(url, target, source)
        except (OSError, DataError) as error:  # URLError, timeouts and refused connections are all OSErrors
            failures.append(f"{url}: {error}")
        else:
            return target
    raise DataError(
        f"could not download {source.filename}:\n  " + "\n  ".join(failures) + "\n"
        f"If this machine is offline, get the file elsewhere and put it at {target}"
    )


def _download(url: str, target: Path, source: Source) -> None:
    """Download to a temporary file beside ``target``, check it, then rename: no reader ever sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as sink, urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            for chunk in _chunks(response.read):
                sink.write(chunk)
        found = _md5(partial, source.unpacked)
        if found != source.md5:
            raise DataError(f"damaged or changed: expected md5 {source.md5}, found {found}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _md5(path: Path, unpacked: bool) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with cast("IO[bytes]", gzip.open(path) if unpacked else path.open("rb")) as file:
            for chunk in _chunks(file.read):
                digest.update(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        return f"nothing: not a whole gzip file ({error})"
    return digest.hexdigest()


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    return iter(lambda: read(_CHUNK), b"")
