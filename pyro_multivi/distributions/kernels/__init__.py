"""Likelihoods and their gradients, block by block of features; no cells x features matrix is formed."""
