"""The front door: clients and operators on one listener, the tokens of the workers on another."""
