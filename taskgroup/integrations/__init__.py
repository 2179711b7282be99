"""Trainers of other libraries; each module here imports its library, and ``taskgroup`` does not."""
