"""What the studies share: their settings, results, quadratics, networks, and small tasks that train in seconds."""
