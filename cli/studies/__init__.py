"""The claims of the papers as small experiments, a module each."""
