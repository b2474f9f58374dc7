"""Queries mapped onto a trained model: means of features that were not measured, labels of neighbours."""
