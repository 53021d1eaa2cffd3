"""Comparisons: methods trained for the same sampled tokens, and what came out."""
