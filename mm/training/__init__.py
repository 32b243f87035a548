"""The training engine under every stage: data order, optimizer, loop, metrics, exact resume."""
