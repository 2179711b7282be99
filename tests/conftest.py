"""One thread: the tests are small, and two processes of two threads on two cores stand in line."""

import torch

torch.set_num_threads(1)

# `make gpu` runs these where there is one; what they test runs on the host in the other tests.
collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
