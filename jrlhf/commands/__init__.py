"""One file per verb of the `jrlhf` command; each has `main(argv) -> int`."""
