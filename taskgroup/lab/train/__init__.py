"""Training runs: the settings, the loop, and the folder of a run.

Needs the extra ``train``: ``pip install 'taskgroup[train]'``.
"""
