"""The files that ``taskgroup new`` writes."""
