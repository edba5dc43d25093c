"""A model behind a web page and a JSON API: app.py (routes), batcher.py (the model), server.py."""
