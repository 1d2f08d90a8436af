"""The update as kernels: one pass over the gradient for a whole list of tensors."""
