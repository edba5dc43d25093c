"""`python -m coca_jax` is the command `coca-jax`."""

import sys

from coca_jax.training import stopping

if sys.argv[1:2] and sys.argv[1] in stopping.SAVED:
    stopping.install()  # before the imports of cli: a request to stop may come at any moment

from coca_jax import cli  # noqa: E402

cli.main()
