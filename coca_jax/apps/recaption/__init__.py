"""Data in, data with captions, scores and embeddings out.

request.py says what is asked for, captioner.py makes the captions of a part of a shard, flags.py
looks at them, shard.py keeps what was made and writes a shard, choose.py says which texts stay,
writers.py knows the formats, whole.py plans and ends the work, engines.py runs it.
"""
