"""Data sets on disk: counts that are read when they are needed."""
