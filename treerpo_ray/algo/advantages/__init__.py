"""Advantages: what each step is credited with, what is taken off from its value, how sure it is."""
