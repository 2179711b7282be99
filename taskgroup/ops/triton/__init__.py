"""The Triton backend: one file per op, kernel and launch together.

Imported when it is first used: the package itself does not need Triton.
"""
