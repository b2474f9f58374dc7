"""Posterior quantities of cells: latent state, normalized values, imputation."""
