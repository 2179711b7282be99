"""Everything to run, compare, draw and report experiments from the command line."""
