"""The commands of the command line, one file per group; ``taskgroup.lab.cli`` puts them together.

A command imports what it needs when it runs, so that ``taskgroup --help`` answers quickly.
"""
