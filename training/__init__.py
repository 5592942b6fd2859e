"""Training a CA-Stream model: settings, model, objective, loop, checkpoints."""
