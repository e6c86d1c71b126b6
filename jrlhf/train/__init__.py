"""The one step, the host loop around it, and what they write."""
