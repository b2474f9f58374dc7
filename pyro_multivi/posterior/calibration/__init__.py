"""Calibration after training, on cells of both modalities: how to impute what was not measured."""
