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
