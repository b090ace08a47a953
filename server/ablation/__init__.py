"""Ablation: which part of a method earned the gain. Plans, the least training that answers them, effects, and a report."""
