"""Comparisons of methods over several seeds, and of affinities with gains."""
