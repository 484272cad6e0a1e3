"""The command `espalier`, which is `python -m espalier` too."""

import sys


def main() -> int:
    """Run the command of this process; what it needs, torch above all, is imported only then. Returns the exit code."""
    if sys.argv[1:] == ["--version"]:
        from espalier.version import __version__

        print(f"espalier {__version__}")
        return 0
    from espalier import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
