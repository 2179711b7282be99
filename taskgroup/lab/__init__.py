"""Everything to run, compare, draw and report experiments from the command line.

A recipe holds the settings of a run. It names a problem: a data set with its network, losses and
metrics. The packages build on these two, each on those before it: vision, data, train, report,
compare, commands.
"""
