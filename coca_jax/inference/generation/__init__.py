"""Captions from image tokens: greedy decoding, sampling and beam search, one compiled program.

loop.py runs the program, choice.py and beams.py say which token comes next; settings.py, which
needs no JAX, is what a user may ask for.
"""
