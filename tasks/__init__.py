"""Lightning tasks: a folder a domain, and what all domains share. `base.py` states what a new domain needs."""
