"""What the adapter to AUTOMATIC1111 does for canvases: views, stages, window prompts, decoding in tiles."""
