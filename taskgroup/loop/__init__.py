"""The loop over the task groups of a batch."""
