"""Changes of the UNet during sampling: the layout reader, the undo log, the session, and the methods."""
