"""`adam-mini compare`: the same recipes with several optimizers, learning rates and seeds."""
