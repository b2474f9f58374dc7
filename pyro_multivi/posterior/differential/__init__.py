"""Differential expression and accessibility between groups of cells."""
