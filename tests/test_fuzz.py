"""Random networks, written as people write them, against oracles that know nothing of operators.

100 networks here, 2,000 in nightly mode (ESPALIER_NIGHTLY=1), where hypothesis looks for others as well. A network that
fails is shown as source; its seed is in the name of the test: `pytest "tests/test_fuzz.py::test_a_random_network[17]"`.
"""

import random

import pytest
import torch
from effort import FACTOR, NIGHTLY, effort
from fuzzing import Findings, WrongError, check, check_claims, check_growths, check_removals
from grammar import OPERATORS, Written, compose, network, programs, smallest
from hypothesis import given
from hypothesis import strategies as st

from espalier.attaching import attach

NETWORKS = 100 * FACTOR


def fails(written: Written, seed: int) -> bool:
    try:
        check(written.model, written.x, seed)
    except WrongError:
        return True
    return False


def test_a_direction_with_one_entry_left_is_of_use():
    written = compose("image", 0, (17934,))  # a weight norm of two units, of which one is not read
    assert check(written.model, written.x, 0, plans=2).counts["networks"] == 1


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_a_random_network(seed):
    written = network(seed)
    try:
        found = check(written.model, written.x, seed, plans=2)
    except WrongError as error:
        if not NIGHTLY:
            raise
        small = smallest(written.recipe, lambda one: fails(one, seed))
        raise WrongError(f"{error}\n\nThe smallest of its parts that fails:\n{small!r}") from error
    assert found.counts["networks"] == 1


@effort(10)
@given(programs(), st.integers(0, 2**16 - 1))
def test_networks_that_hypothesis_draws(written, seed):
    found = check(written.model, written.x, seed, plans=2)
    assert found.counts["networks"] == 1


@pytest.mark.slow
def test_the_checks_look_at_something(capsys):
    """Shares over some networks, printed: an oracle that feels nothing, or axes that are all frozen, test nothing."""
    found, used = Findings(), set()
    count = 40 * FACTOR
    for seed in range(NETWORKS, NETWORKS + count):
        model, x, _, operators = network(seed)
        used |= operators
        structure = attach(model, x)
        found.add(check_claims(model, x, structure, torch.Generator().manual_seed(seed), 4))
        found.add(check_removals(model, x, structure, random.Random(seed), 2))
        found.add(check_growths(model, x, structure, random.Random(seed), 2))
    with capsys.disabled():
        print(f"\n{count} networks: " + ", ".join(f"{value} {key}" for key, value in sorted(found.counts.items())))
    counts = found.counts
    assert counts["shaken"] >= 2 * count
    assert found.share("felt", "shaken") >= 0.95
    interface = counts["frozen: input"] + counts["frozen: output"] + counts["frozen: lookup"]
    assert counts["frozen"] - interface <= 0.5 * (counts["axes"] - interface)
    assert found.share("removals, exact", "removals") >= 0.75
    assert found.share("growths, exact", "growths") >= 0.75
    assert len(found.refusals) <= 0.03 * (counts["removals"] + counts["growths"]), found.refusals[:3]
    assert len(used) >= 0.6 * len(OPERATORS)


# --- The grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_a_seed_gives_one_network(seed):
    first, second = network(seed), network(seed)
    assert repr(first) == repr(second)
    assert torch.equal(first.x, second.x)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_a_recipe_gives_the_network_again():
    written = network(5)
    assert repr(compose(*written.recipe)) == repr(written)
    assert repr(written).startswith(f"# compose(*{tuple(written.recipe)})")


def test_a_network_is_found_without_the_blocks_that_do_not_matter():
    written = next(one for one in map(network, range(200)) if "foreign" in one.operators and len(one.recipe.blocks) > 2)
    small = smallest(written.recipe, lambda one: "foreign" in one.operators)
    assert "foreign" in small.operators
    assert len(small.recipe.blocks) == 1


@pytest.mark.slow
def test_every_block_is_written_sooner_or_later():
    used = set().union(*(network(seed).operators for seed in range(600)))
    assert used == OPERATORS


def test_operators_of_third_parties_freeze_what_they_touch():
    count = 0
    for seed in range(150):
        written = network(seed)
        if "foreign" in written.operators:
            structure = attach(written.model, written.x)
            assert any("espalier_tests" in name for name in structure.topology.unknown)
            count += 1
    assert count >= 5
