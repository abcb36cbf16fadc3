"""From settings, model and size to what is to be done: pure functions, printable. No torch."""
