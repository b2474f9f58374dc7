"""Scripts for scvi-tools: its arguments, attributes and minified data."""
