"""Forks: what trees tell of each place to fork at, what a fork there saves, which one to grow."""
