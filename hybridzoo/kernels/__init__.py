"""Functions of tensors, one folder an op: `from hybridzoo.kernels.ssd import ssd`."""
