"""Readers of data formats: a source has a length, records by index and stable ids."""
