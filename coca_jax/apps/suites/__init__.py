"""Suites of data sets that others score their models on, with their own definitions of each figure.

tables.py says which data sets a suite has, folders.py reads one as it lies there, measuring.py
asks the model, metrics.py turns what it said into figures, running.py goes through a suite and
keeps what is finished, comparing.py lays several models over each other. clip_benchmark.py lets
CLIP_benchmark itself run our models.
"""
