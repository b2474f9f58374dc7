"""Calibration after training, on cells of both modalities."""
