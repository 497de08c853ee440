"""One thread for each test process: models this small gain nothing from more, and beside other work
threads would wait for each other.
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
