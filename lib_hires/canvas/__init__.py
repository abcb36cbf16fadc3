"""The canvas: a denoiser over views of a large latent, and what each view is told."""
