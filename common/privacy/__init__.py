"""Differential privacy: what noisy releases about a patient cost together."""
