"""An actor with the surface that the Ray launcher needs of a worker, and nothing behind it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from configs.worker_spec import WorkerSpec


class StandInWorker:
    """Fails in its constructor when the model's source is `broken`. Writes `stopped` beside the model directory on stop."""

    def __init__(self, spec_json: str) -> None:
        self._spec = WorkerSpec.model_validate_json(spec_json)
        if self._spec.model.source == "broken":
            raise ValueError("this model is broken")

    def info(self) -> dict[str, Any]:
        """Who and where."""
        import ray

        return {
            "pid": os.getpid(),
            "address": f"{ray.util.get_node_ip_address()}:1234",
            "instance_id": self._spec.instance_id,
            "rank": self._spec.rank,
            "gpus": ray.get_gpu_ids(),
        }

    def stop(self, grace_s: float = 0.0) -> int:
        """Leaves a trace of a graceful stop."""
        if self._spec.model_dir is not None:
            path = Path(self._spec.model_dir) / f"stopped-{self._spec.instance_id}-{self._spec.rank}"
            path.write_text(str(grace_s))
        return 0
