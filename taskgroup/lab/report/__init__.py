"""Figures and the HTML page of runs, and the live display in the terminal."""
