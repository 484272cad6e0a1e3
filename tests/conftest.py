"""What every test shares: one thread, a fixed seed, hypothesis without deadlines, and real data where they exist."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("espalier", deadline=None, print_blob=True)
settings.load_profile("espalier")
# two workers share two cores, and the networks are too small to gain from more threads
torch.set_num_threads(1)


TABLES = (
    "test_silent_units_go_without_a_trace",
    "test_growth_is_exact_where_the_contract_says_so",
    "test_a_unit_that_one_reader_still_reads_does_not_go_as_if_it_contributed_nothing",
    "test_a_unit_that_contributes_never_goes_as_if_it_did_not",
    "test_exact_is_said_only_where_the_outputs_stay",
    "test_ghosts_compute_what_the_grown_network_would",
    "test_every_network_at_half_and_at_twice_its_cost",
    "test_what_sites_list_can_be_done_and_undone",
)
"""Tests of every small case or network: of each case every second runs by default, the others with `-m slow`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    counts = dict.fromkeys(TABLES, 0)
    for item in items:
        name = item.name.partition("[")[0]
        if name in counts:
            if (counts[name] + TABLES.index(name)) % 2:
                item.add_marker(pytest.mark.slow)
            counts[name] += 1


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """No test depends on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data sets; the test is skipped where ESPALIER_DATA does not name one."""
    folder = os.environ.get("ESPALIER_DATA")
    if not folder:
        pytest.skip("ESPALIER_DATA does not name a folder of real data")
    return Path(folder)
