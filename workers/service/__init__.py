"""A worker process: the engine on its thread, the loops around it, and the ways to run it."""
