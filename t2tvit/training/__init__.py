"""The trainer: configuration, the run and its state, evaluation, prediction, benchmark, plots."""
