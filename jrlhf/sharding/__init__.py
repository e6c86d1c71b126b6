"""Where arrays live: the mesh, logical axis rules, placement and processes."""
