"""Installs every extra alone on top of the core, and runs the smallest use of it (`tools/extras/use_*.py`).

    python tools/check_extras.py [EXTRA ...] [--folder build/extras]

The core is installed once. The environment of an extra sees it, and beside it nothing but what the extra brings.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
USES = {path.stem.removeprefix("use_"): path for path in sorted((ROOT / "tools" / "extras").glob("use_*.py"))}


def made(folder: Path, core: Path | None) -> Path:
    """The interpreter of an environment, which is made if it is not there; it sees the packages of the core's."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        if core is not None:
            (packages(python) / "core.pth").write_text(f"{packages(core)}\n")
    return python


def packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


def install(python: Path, extra: str | None) -> None:
    what = str(ROOT) if extra is None else f"{ROOT}[{extra}]"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "-e", what], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"default: all of {', '.join(USES)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "extras", help="where environments are kept")
    options = parser.parse_args()
    if unknown := set(options.extras) - set(USES):
        parser.error(f"there is no extra {', '.join(sorted(unknown))}; expected some of {', '.join(USES)}")
    core = made(options.folder.resolve() / "core", None)
    install(core, None)
    failed = []
    for extra in options.extras or USES:
        try:
            python = made(options.folder.resolve() / extra, core)
            install(python, extra)
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([python, USES[extra]], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": ""})
        except subprocess.CalledProcessError:
            failed.append(extra)
        print(f"{extra}: {'failed' if extra in failed else 'installed and used'}", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
