"""Features of several samples: those that all have, or any."""
