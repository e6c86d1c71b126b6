"""The TRL-shaped faces: each joins data, roles and an algorithm, and hands them to the loop."""
