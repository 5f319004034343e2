"""Tensors of an .npz as .safetensors, run by an environment that has the library: convert.py NPZ SAFETENSORS"""

import sys

import numpy as np
from safetensors.numpy import save_file

with np.load(sys.argv[1], allow_pickle=False) as file:
    save_file({name: file[name] for name in file.files}, sys.argv[2], metadata={"format": "pt"})
