"""Processes that share a call."""
