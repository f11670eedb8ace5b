"""The ``embedge`` command, and ``python -m embedge``.

Little is imported before :func:`main` runs, so that a missing package or an interrupt of the imports is a
message, not a traceback.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Runs a command and returns its exit code, see :mod:`embedge.runtime.cli.main`."""
    if sys.argv[1:] == ["--version"]:
        from embedge import __version__

        print(f"embedge {__version__}")
        return 0
    try:
        from embedge.runtime.cli.main import main as run
    except KeyboardInterrupt:
        print("embedge: error: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        advice = "install embedge again, with what it depends on"
        print(f"embedge: error: {error}; {advice}", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
