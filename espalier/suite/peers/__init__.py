"""Packages of others in the same harness, one file each: same data, same budget, same looks, same end."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from espalier.errors import RunError
from espalier.suite.peers.gromo import Gromo
from espalier.suite.peers.peer import Peer
from espalier.suite.peers.torch_nn_utils_prune import TorchPrune
from espalier.suite.peers.torch_pruning import TorchPruning

PEERS: Mapping[str, Peer] = MappingProxyType(
    {"torch-pruning": TorchPruning(), "gromo": Gromo(), "torch.nn.utils.prune": TorchPrune()}
)


def find_peer(name: str) -> Peer:
    """The peer of that name. Raises RunError that lists those there are."""
    if name not in PEERS:
        raise RunError(f"there is no peer {name!r}: expected one of {', '.join(PEERS)}")
    return PEERS[name]


def installed(package: str) -> str | None:
    """The version of a package; None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


__all__ = ["PEERS", "find_peer", "installed"]
