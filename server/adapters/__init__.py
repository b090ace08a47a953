"""Adapters on disk, one module at a time: merged, changed later, folded into a model, inspected."""
