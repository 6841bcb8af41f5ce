"""The command.

gRPC reads its settings when it is imported: it would tell of forks on stderr, and its fork handlers may abort children that are
about to run another program (Ray's start).
"""

from configs.env import set_for_libraries

set_for_libraries({"GRPC_VERBOSITY": "ERROR", "GRPC_ENABLE_FORK_SUPPORT": "0"})
