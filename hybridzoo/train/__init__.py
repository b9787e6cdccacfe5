"""Training: data, loss, optimiser groups and the loop."""
