"""The packaged recipes, one folder for each domain."""
