"""From the affinity to a partition of the tasks."""
