"""The CPU kernels of the torch engine: C++ compiled on first use, a decode step as one call, and the driver around it."""
