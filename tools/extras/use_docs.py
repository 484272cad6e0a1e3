"""The pages, built."""

import subprocess
import sys
from pathlib import Path

root = Path(__file__).parents[2]
site = Path("site").resolve()
subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)], check=True, cwd=root
)
assert (site / "reference" / "index.html").exists()
