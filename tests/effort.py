"""How hard the property-based tests try: profile "ci" by default; "nightly", 20 times as many networks and other ones
every time, where ESPALIER_NIGHTLY is set. Only "nightly" shrinks what fails, which takes minutes.

Of large tables of cases a part runs by default, and the others with `-m slow`.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("nightly", settings.get_profile("ci"), derandomize=False, phases=tuple(Phase))

NIGHTLY = bool(os.environ.get("ESPALIER_NIGHTLY"))
FACTOR = 20 if NIGHTLY else 1


def effort(networks: int) -> settings:
    """Settings for a test that looks at so many networks in profile "ci"."""
    profile = settings.get_profile("nightly" if NIGHTLY else "ci")
    return settings(profile, max_examples=networks * FACTOR)


def in_turn(*numbers: int) -> list[pytest.MarkDecorator]:
    """The marks of a case in a table, by its row and its column: two of three, in diagonals, are slow."""
    return [pytest.mark.slow] if sum(numbers) % 3 else []
