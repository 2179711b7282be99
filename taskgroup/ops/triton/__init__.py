"""The Triton backend: one file per op, with the kernel and its launch.

It is imported at its first use, because the package itself does not need Triton.
"""
