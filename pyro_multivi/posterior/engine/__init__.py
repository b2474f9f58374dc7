"""Posterior draws: latents, what is decoded from them, replicated counts, likelihoods."""
