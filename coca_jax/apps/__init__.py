"""Applications built on the packages below: fit, benchmark, recaption, search, serve."""
