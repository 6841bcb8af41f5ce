"""The hand-off of KV blocks between workers: a sender that pushes, a receiver that verifies, and the ledger of both."""
