"""Small applications built on the library: fit, benchmark, recaption, search, serve; and `batched`,
a model as a function of columns for data engines."""

from coca_jax.apps.batched import batched

__all__ = ["batched"]
