"""Settings of the whole suite."""

import torch

# What the tests compare is float32's arithmetic; a GPU takes TF32 for convolutions by itself.
torch.backends.cudnn.allow_tf32 = False
