"""Variants of a recipe beside each other: the table, its runs, what came out."""
