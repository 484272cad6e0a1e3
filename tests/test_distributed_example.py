"""The example of several processes, run by torchrun; and what is left when one of its ranks is killed."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import espalier as esp

EXAMPLE = Path(__file__).parent.parent / "examples" / "distributed.py"
pytestmark = pytest.mark.slow


def torchrun(*options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=300)[0]
    finally:
        process.kill()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("how", [[], ["--shard"]], ids=["replicas", "shards"])
def test_a_killed_rank_ends_the_job_and_leaves_a_checkpoint(how: list[str], tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("looks processes up in /proc")
    options = [*how, "--checkpoint", str(tmp_path / "saved")]
    process = torchrun(*options)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("saved at step 80"):
            break
    started = time.monotonic()
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    ended(process)
    assert process.returncode != 0
    assert time.monotonic() - started < 120
    build = runpy.run_path(str(EXAMPLE))["build"]
    structure = esp.load(tmp_path / "saved", build(), torch.zeros(1, 16))
    assert structure.axes["0"].size > 24
    assert bool(structure.model(torch.zeros(1, 16)).isfinite().all())
    process = torchrun(*options)
    said = ended(process)
    assert process.returncode == 0
    found = re.search(r"loss ([\d.]+) after 240 steps on 2 ranks", said)
    assert found is not None
    assert float(found[1]) < 0.5
    assert said.count("(grow)") == said.count("(prune)") == 3
