"""The version of the package, which setup.py and the parts of the package read."""

__version__ = "0.1.0"
