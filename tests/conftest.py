"""What every test shares: one thread, a fixed seed, hypothesis without deadlines, and real data where they exist."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("espalier", deadline=None, print_blob=True)
settings.load_profile("espalier")
# two workers share two cores, and the networks are too small to gain from more threads
torch.set_num_threads(1)


TABLES = {
    "test_what_may_change_and_what_not": 2,
    "test_parameters_stay_what_they_are": 2,
    "test_silent_units_go_without_a_trace": 4,
    "test_growth_is_exact_where_the_contract_says_so": 3,
    "test_a_unit_that_one_reader_still_reads_does_not_go_as_if_it_contributed_nothing": 3,
    "test_a_unit_that_contributes_never_goes_as_if_it_did_not": 3,
    "test_exact_is_said_only_where_the_outputs_stay": 6,
    "test_ghosts_compute_what_the_grown_network_would": 6,
    "test_every_network_at_half_and_at_twice_its_cost": 4,
    "test_what_sites_list_can_be_done_and_undone": 12,
    "test_a_network_of_nested_modules": 3,
    "test_a_random_network": 8,
    "test_a_hundred_edits_and_a_hundred_undos_give_back_every_byte": 2,
    "test_training_goes_on_after_random_edits": 4,
    "test_every_optimizer_trains_on": 2,
    "test_every_network_trains_one_step_on_every_size_it_takes": 2,
    "test_no_network_of_the_zoo_is_disturbed": 2,
    "test_new_units_learn": 2,
    "test_a_method_repeats_with_its_seed": 2,
    "test_masks_follow_as_weights_do_in_any_network": 4,
    "test_edits_of_layers_that_are_undone_leave_no_trace": 3,
    "test_copies_of_cells_of_two_states_get_the_results_of_the_two_before": 2,
    "test_its_budget_is_kept": 3,
    "test_memory_holds_one_tensor_twice_and_no_more": 2,
    "test_methods_combine": 4,
    "test_methods_of_widths_follow_layers_that_come_and_go": 3,
    "test_a_network_of_other_layers_is_saved_and_trains_on": 4,
    "test_a_session_grows_deep_networks_without_a_jump": 3,
    "test_left_out_is_multiplied_by_zero": 3,
    "test_a_thousand_steps_leave_masked_weights_and_their_momenta_at_zero": 3,
    "test_loaded_network_goes_on_as_the_saved_one": 2,
    "test_growth_is_exact_in_train_and_eval_mode": 3,
    "test_a_method_works_on_every_kind_of_network": 2,
    "test_every_axis_at_once_and_each_alone": 2,
    "test_a_failure_of_every_stage": 2,
    "test_settings_end_at_their_size": 2,
    "test_small_networks_of_every_kind": 2,
    "test_a_bottleneck_of_one_unit_comes_first": 2,
    "test_a_failure_at_every_change_puts_everything_back": 3,
    "test_a_failure_at_every_replacement": 2,
    "test_a_failure_of_every_stage_leaves_everything": 2,
    "test_the_first_step_of_old_entries_is_that_of_a_run_without_growth": 2,
    "test_every_axis_grows_exactly": 2,
    "test_a_silenced_layer_is_a_removed_one_in_both_modes": 2,
}
"""Tests of every small case, network or method, and which of their cases run by default: one of so many. The others run
with `-m slow`."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    counts = dict.fromkeys(TABLES, 0)
    for item in items:
        name = item.name.partition("[")[0]
        if name in counts:
            if counts[name] % TABLES[name]:
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


@pytest.fixture
def double() -> Iterator[None]:
    """All is computed in float64, in which rounding does not hide what is wrong; see `ranks.double`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
