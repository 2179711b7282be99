"""Modules with one head per task, and what optimizers and layers keep between group steps."""
