"""Minified data: the posterior of each cell in place of its counts."""
