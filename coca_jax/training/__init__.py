"""Training: the Trainer, its callbacks, the train step, batches on their way to the devices."""
