"""Cost of a training before it is run."""
