"""What serving costs: parameters, bytes and FLOPs of models, the time of an engine step, and of a service in a closed loop.

Pure: no clock, no socket, no file but the package's own tables. The scheduler, the planner and the simulator share it.
"""
