"""`python -m coca_jax.report`."""

from coca_jax import cli

cli.command("report")
