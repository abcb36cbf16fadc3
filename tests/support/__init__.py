"""Real networks and samplers at tiny widths, and what tests observe of them."""
