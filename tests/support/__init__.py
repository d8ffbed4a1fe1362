"""Helpers of several test files, except fixtures. No test file imports another."""
