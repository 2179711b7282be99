"""Training runs: the loop, the folder of a run, and what can be read from it.

Needs the extra ``train``: ``pip install 'taskgroup[train]'``.
"""
