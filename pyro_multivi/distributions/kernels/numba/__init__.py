"""The element-wise loops of the likelihoods, compiled by Numba. Imported only where compilation is asked for."""
