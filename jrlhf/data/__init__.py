"""Data: rows of text to numpy batches of token ids.

`sources` finds the rows and `formats` knows TRL's dataset types; `guard`, `templates`, `encode` and
`cells` turn text into ids that user text cannot forge; `tokenize` makes training rows and `pack`
fills sequences; `collate` makes batches of static shape and `loader` orders them as a function of
(seed, epoch, step).
"""
