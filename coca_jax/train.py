"""`python -m coca_jax.train` is `coca-jax train`; see `cli.train`."""

from __future__ import annotations

if __name__ == "__main__":
    # Signals are handled before the imports below: a request to stop may come at any moment.
    from coca_jax.runtime import signals

    signals.install()

    from coca_jax.cli import main

    main.command("train")
