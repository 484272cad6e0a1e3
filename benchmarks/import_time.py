"""What `import espalier` costs beyond `import torch`, and what the names that are used first cost on top.

    python benchmarks/import_time.py [--repeats 15]

Every figure is the median over new processes, which take turns. Each imports torch and is then timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys

import torch

WANTED = 0.3
"""Seconds that `import espalier` may take beyond importing torch."""
CASES = {
    "import espalier": "import espalier",
    "from espalier import attach": "from espalier import attach",
    "espalier.attach(mlp, x)": "import espalier; espalier.attach(mlp, x)",
    "from espalier import attach, grow, Session": "from espalier import attach, grow, Session",
    "from espalier import *": "from espalier import *",
}
SCRIPT = """
import sys, time
import torch

torch.set_num_threads(1)
mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
x = torch.randn(3, 4)
before = set(sys.modules)
start = time.perf_counter(), time.process_time()
exec(sys.argv[1])
print(time.perf_counter() - start[0], time.process_time() - start[1], len(set(sys.modules) - before))
"""


def once(code: str) -> tuple[float, float, int]:
    """In a new process: seconds of the clock and of the processor that the code takes, and the modules it loads."""
    printed = subprocess.run([sys.executable, "-c", SCRIPT, code], capture_output=True, text=True, check=True).stdout
    clock, cpu, modules = printed.split()
    return float(clock), float(cpu), int(modules)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="processes per row (default: 15)")
    options = parser.parse_args()
    for code in CASES.values():
        once(code)  # files are read from memory from now on, and there is bytecode
    found = [{name: once(code) for name, code in CASES.items()} for _ in range(options.repeats)]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{platform.machine()}, {versions}, {options.repeats} processes\n")
    print("| after `import torch` | seconds | of the processor | modules |\n| --- | --- | --- | --- |")
    for name in CASES:
        clock, cpu = (statistics.median(one[name][which] for one in found) for which in (0, 1))
        print(f"| `{name}` | {clock:.3f} | {cpu:.3f} | {found[0][name][2]} |")
    taken = statistics.median(one["import espalier"][0] for one in found)
    print(f"\n`import espalier`: {taken:.4f} s; wanted: less than {WANTED} s")
    return 0 if taken < WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
