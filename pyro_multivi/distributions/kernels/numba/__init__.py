"""Element-wise loops of likelihoods and first layers, compiled by Numba.

Only ``loops`` and ``scalar_math`` import Numba, an optional dependency: :func:`.switch.compiled_loops` imports them.
"""
