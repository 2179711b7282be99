"""One thread: the tests are small, and two processes of two threads on two cores stand in line."""

import torch

torch.set_num_threads(1)
