"""Training the stream: arguments, model, objective, loop, checkpoints."""
