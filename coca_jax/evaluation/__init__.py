"""Evaluators, metrics, statistics and the report of a run."""
