"""`coca-jax`, and `python -m coca_jax`, up to the imports of its commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs `cli.main`. Whoever asks it to stop while that is imported is heard as well."""
    try:
        from coca_jax.training import start, stopping

        if sys.argv[1:2] and sys.argv[1] in stopping.SAVED:
            start.begin()
        elif sys.argv[1:3] == ["benchmark", "train"] and "--peer" not in sys.argv:
            # The peer would have them too, as it has them nowhere else.
            start.with_huge_pages()
        from coca_jax import cli

        cli.main()
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
