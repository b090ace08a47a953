"""Runs a federation: stages, merging, evaluation and the command line."""
