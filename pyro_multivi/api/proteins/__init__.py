"""Proteins, and other extra modalities."""
