"""Grammars over tokens with llguidance: which tokens may come next. llguidance is imported inside this package only."""
