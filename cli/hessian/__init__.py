"""`adam-mini hessian`: the Hessian of a recipe's model, its spectra by block, and which block structure fits it."""
