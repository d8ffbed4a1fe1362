"""Comparing models that are trained with the same budget on the same data."""
