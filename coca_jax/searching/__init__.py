"""Embeddings of many pictures kept in a folder: made, searched, grouped."""
