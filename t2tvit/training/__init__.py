"""The trainer: configuration, data, updates, evaluation, checkpoints, log."""
