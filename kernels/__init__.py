"""The Triton backend: one file an op, launcher and kernel of the same name. Installed as `sparseft.kernels`."""
