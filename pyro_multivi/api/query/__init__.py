"""Queries: cells of new batches, mapped onto a trained model."""
