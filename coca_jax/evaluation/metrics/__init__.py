"""Metric functions over NumPy arrays."""
