"""Tests. The import comes first of all: what it sets for the threads of torch counts only before torch is imported."""

from __future__ import annotations

import workers.engines.torch  # noqa: F401
