"""Counts of fragments: checks of them, and counts of reads turned into them."""
