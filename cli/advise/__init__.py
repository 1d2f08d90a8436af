"""`adam-mini advise`: which structure of the second moment each matrix of a recipe's model needs."""
