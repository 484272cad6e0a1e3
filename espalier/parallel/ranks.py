"""What the processes of one training tell each other: over a group of their own, so that nothing meets what a
wrapper sends.

Invariant: every exchange says what it is about and whether a process has failed, and every process hears all of it, so
that all of them raise the same error. A process that does not come at all is noticed by the timeout of the group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from espalier.edit.plan import Plan
from espalier.errors import ParallelError
from espalier.parallel.batches import digest, on_cpu, together

T = TypeVar("T")
_SHOWN = 300
"""Characters of a plan or value that a message quotes."""


class Ranks:
    """The processes of a group, ordered by rank; the first one leads.

    It is that part of `espalier.peers.Peers` which does not depend on how the network is divided among them.
    """

    def __init__(self, members: Sequence[int], group: Any, device: torch.device) -> None:
        """A group of its own for these global ranks; called by each of them, and by no other.

        Args:
            members: global ranks.
            group: theirs on the device; a process that does not come within its timeout is an error here too.
            device: where the network is.
        """
        self._members = list(members)
        self._timeout: timedelta = group._get_backend(device).options._timeout
        self._group: Any = dist.new_group(
            self._members, timeout=self._timeout, backend="gloo", use_local_synchronization=True
        )

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self._members)

    @property
    def leads(self) -> bool:
        """Whether this is the first one."""
        return dist.get_rank() == self._members[0]

    def exchange(self, what: str, value: Any = None, error: Exception | None = None) -> list[Any]:
        """What every process gave, by rank.

        Raises:
            ParallelError: some failed and others did not; they came to different places of the program; or one did not
                come within the timeout. The first two are raised, with one message, by all.
        """
        failure = None if error is None else f"{type(error).__name__}: {error}"
        posts: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(posts, (what, value, failure), group=self._group)
        except RuntimeError as problem:
            raise ParallelError(
                f"{what}: not all of the {self.size} ranks came here within {self._timeout}: {problem}. Call whatever "
                "edits the network, or takes a step of the session, equally often on every rank, and look for the "
                "error of the rank that is missing."
            ) from problem
        failures = {self._members[at]: post[2] for at, post in enumerate(posts) if post[2] is not None}
        if 0 < len(failures) < self.size:
            said = "; ".join(f"rank {rank}: {one}" for rank, one in failures.items())
            place = next(post[0] for post in posts if post[2] is None)
            raise ParallelError(f"{place} failed on {len(failures)} of {self.size} ranks: {said}") from error
        if len({post[0] for post in posts}) > 1:
            said = ", ".join(f"rank {self._members[at]} is at {post[0]}" for at, post in enumerate(posts))
            raise ParallelError(
                f"the ranks are at different places of the program: {said}; edit the network, and take steps of the "
                "session, in the same order on every rank."
            )
        return [post[1] for post in posts]

    def meet(self, what: str, plan: Plan | None, sizes: Mapping[str, int]) -> None:
        """See `Peers.meet`."""
        shown = what if plan is None else str(plan).replace("\n", "; ")
        found = {"edit": what if plan is None else plan, "network": dict(sizes)}
        advice = "Make the same edit on every rank, or let an espalier.Session decide for all of them."
        self.same("an edit", found, shown, advice)

    def settle(self, what: str, error: Exception | None) -> None:
        """See `Peers.settle`. Where all failed each goes on with its own error; what all heard of is not told again."""
        if not isinstance(error, ParallelError):
            self.exchange(what, error=error)

    def agreed(self, what: str, value: T) -> T:
        """See `Peers.agreed`. Tensors come from the CPU."""
        self.exchange(what)
        parcel: list[Any] = list(_packed(value)) if self.leads else [None, None]
        dist.broadcast_object_list(parcel, src=self._members[0], group=self._group)
        return value if self.leads else _unpacked(*parcel)

    def mean(self, what: str, value: float | None) -> float | None:
        """See `Peers.mean`."""
        found = [one for one in self.exchange(what, value) if one is not None]
        return sum(found) / len(found) if found else None

    def joined(self, batch: Any) -> Any:
        """See `Peers.joined`."""
        return together(self.exchange("the batches of an event", on_cpu(batch)), batch)

    def same(self, what: str, found: Mapping[str, Any], shown: str = "", advice: str = "") -> None:
        """See `Peers.same`.

        Args:
            what: is compared.
            found: by name, of which hashes are compared.
            shown: what this process has, in words, for the message.
            advice: how to fix it.
        """
        posts = self.exchange(what, ({name: digest(one) for name, one in found.items()}, shown[:_SHOWN]))
        for rank, (hashes, words) in zip(self._members, posts, strict=True):
            differing = [name for name, one in hashes.items() if one != posts[0][0].get(name)]
            if differing or hashes.keys() != posts[0][0].keys():
                said = f": {posts[0][1]!r} on rank {self._members[0]}, {words!r} on rank {rank}" if words else ""
                raise ParallelError(
                    f"{what}: rank {rank} has another {' and '.join(differing) or 'set of names'} than rank "
                    f"{self._members[0]}{said}. {advice or 'Make them the same on every rank.'}"
                )


def _packed(value: Any) -> tuple[str | None, Any]:
    """A value as what can be sent: the JSON of a plan and its tensors, or None and the value."""
    if not isinstance(value, Plan):
        return None, on_cpu(value)
    starts = {number: dict(one) for number, one in value.starts.items()}
    return value.to_json(), on_cpu((dict(value.values), dict(value.deltas), starts))


def _unpacked(plan: str | None, value: Any) -> Any:
    return value if plan is None else Plan.from_json(plan, *value)


__all__ = ["Ranks"]
