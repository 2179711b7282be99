"""Models with one head per task, and what group steps do to heads, optimizers and statistics."""
