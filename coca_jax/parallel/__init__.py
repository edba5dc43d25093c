"""Device mesh, logical axes and shardings."""
