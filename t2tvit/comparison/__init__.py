"""Many models trained with one budget on the same data, in a table and plots."""
