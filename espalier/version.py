"""Which version of the package this is."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("espalier")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "not installed"

__all__ = ["__version__"]
