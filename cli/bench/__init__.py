"""`adam-mini bench`: the time of a step beside its peers, and the largest batch that fits into a memory."""
