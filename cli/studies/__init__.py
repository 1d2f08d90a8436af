"""`adam-mini study`: the papers' claims about optimizers and Hessians as recipes, with pictures and tables."""
