"""Calibration after training: last layers, spreads of the posterior, and imputation by pairs of cells."""
