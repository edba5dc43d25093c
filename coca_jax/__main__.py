"""`coca-jax`, and `python -m coca_jax`, up to the imports of its commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs `cli.main`. Whoever asks it to stop while that is imported is heard as well."""
    try:
        from coca_jax.runtime import signals

        if sys.argv[1:2] and sys.argv[1] in signals.SAVED:
            signals.install()
        from coca_jax.cli import main

        main.main()
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
