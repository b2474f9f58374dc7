"""Data sets: files of others, joined modalities, simulated cells, real example cells."""
