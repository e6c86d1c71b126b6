"""Low-rank adapters with PEFT's names, maths and files.

An adapter is a tree of its own beside the base, `params["adapters"][name]`, with the paths of the
modules that it adapts; the base is never written to. `plan` decides from a `LoraConfig` which
modules that are, `tree` puts adapters and base together for one traced call, `layer` is the maths,
`files` reads and writes what PEFT reads and writes.
"""
