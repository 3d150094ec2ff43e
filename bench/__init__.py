"""One script for each claim in the README's tables; each prints a table."""
