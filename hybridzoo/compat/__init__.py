"""Other packages' public names over hybridzoo's kernels."""
