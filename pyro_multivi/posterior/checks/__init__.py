"""Posterior predictive checks: statistics of replicated counts beside those of the data."""
