"""Training runs: one in a folder of its own, or many side by side.

Needs the extra ``train``, a comparison ``compare``: ``pip install 'taskgroup[compare]'``.
"""
