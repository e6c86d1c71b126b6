"""Pure maths of arrays. Imports jax and `jrlhf.types` only: no model, no mesh, no I/O."""
