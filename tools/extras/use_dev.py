"""What checks the package."""

import subprocess
import sys
from pathlib import Path

tests = Path(__file__).parents[2] / "tests"
subprocess.run([sys.executable, "-m", "ruff", "check", str(tests)], check=True)
subprocess.run([sys.executable, "-m", "mypy", "--version"], check=True)
subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", str(tests / "test_dims.py")], check=True
)
