"""Captions from image tokens: greedy decoding, sampling and beam search, one compiled program.

loop.py runs the program, continuous.py with rows that are taken again as captions end; choice.py
and beams.py say which token comes next; settings.py, which
needs no JAX, is what a user may ask for.
"""
