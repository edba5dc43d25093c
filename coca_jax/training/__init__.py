"""A training run: its acts (run), its loop, the hooks of the loop, batches on the way, stopping."""
