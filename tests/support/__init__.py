"""What several test files use: fixtures apart, all helpers are here, and no test imports another."""
