"""Features that were measured in some batches only."""
