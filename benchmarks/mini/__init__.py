"""The small text-to-image models that the project measures on: their world (scenes), their networks, their training."""
