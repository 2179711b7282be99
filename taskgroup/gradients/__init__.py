"""The gradients of single tasks, and the analysis of their inner products."""
