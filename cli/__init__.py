"""The command `adam-mini`."""
