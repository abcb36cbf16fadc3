"""The autoencoder at any size: exact decoding in tiles, and what it costs."""
