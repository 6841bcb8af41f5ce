"""The engine of right answers: arithmetic instead of weights, real KV bytes."""

from workers.engines.oracle.build import create_engine, oracle_model

__all__ = ["create_engine", "oracle_model"]
