"""A model behind a page and an API: `app.build` makes it, `running.serve` keeps it up.

A request goes through guard.py (who may ask, how much), endpoints.py (its fields, by forms.py; its
pictures, by uploads.py), batcher.py (waits for others of its kind) and works.py (what the model is
asked). openapi.py describes what endpoints.py declares.
"""
