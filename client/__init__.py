"""Joins a federation: jobs, data and training."""
