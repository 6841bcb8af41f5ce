"""The Push calls over a transport of our own: gRPC's wire (HTTP/2), received into reused memory and sent from where it lies."""
