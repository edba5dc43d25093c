"""`python -m coca_jax` is the command `coca-jax`."""

from coca_jax import cli

cli.main()
