"""Stages: one sampling run after another, each larger than the one before, and what is handed from one to the next."""
