"""`adam-mini bench`: step times of AdamMini and other optimizers, and the largest batch that fits into a memory."""
