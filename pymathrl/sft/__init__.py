"""Supervised stages: command and loop (command, options), rows of text and their masks (rows), blends of files (blend),
and the model's own verified responses (collect, by the rules of accept; retro shortens them)."""
