"""Speed, memory and what the pictures show; each module is a command that prints a table and writes JSON."""
