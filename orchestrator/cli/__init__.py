"""The command. gRPC reads its verbosity when it is imported: without this it tells of harmless forks (Ray's start) on stderr."""

from configs.env import set_for_libraries

set_for_libraries({"GRPC_VERBOSITY": "ERROR"})
