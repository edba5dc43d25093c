"""What `coca-jax benchmark` times, a file for each of its words."""
