"""The gradients of single tasks, and what their inner products tell."""
