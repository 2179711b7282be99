"""Groupings: from the affinity matrix to a partition of the tasks."""
