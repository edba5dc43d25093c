"""Captions from image tokens, with the names of Hugging Face's `generate`.

config.py is what a user may ask for. processors/ change the scores of the next token, one file
each; strategies/ choose tokens by these scores, one file each. driver.py compiles a config's
strategy and processors with the decoder into programs: a batch at once, a token at a time, or
continuously (continuous.py). A new file in one of the folders is all that a new processor or
strategy needs: its options become fields of GenerationConfig, flags and form fields.
"""
