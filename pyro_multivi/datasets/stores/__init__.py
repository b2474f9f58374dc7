"""Data sets on disk: opened without reading their counts, and written in the form that is read fastest."""
