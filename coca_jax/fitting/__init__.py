"""What `coca-jax fit` does: looks at data and machine, chooses a recipe, trains it, tells."""
