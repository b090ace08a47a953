"""Measures candidates on tasks, compares them with intervals, and writes the report."""
