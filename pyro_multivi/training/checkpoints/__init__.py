"""Checkpoints of training: its whole state, from which another process goes on bit by bit."""
