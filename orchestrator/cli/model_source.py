"""From `model.source` to a checkpoint folder on this machine."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from configs.env import child_environment, model_cache_dir
from configs.schema.pools import ModelConfig
from orchestrator.cli.model import TOOL_MODULE
from protos.contract.errors import ModelError, error_from


async def resolve_model(model: ModelConfig, progress: Callable[[str], None]) -> Path | None:
    """The checkpoint folder, or none for the oracle. The demo model is imported into the cache on first use.

    Raises ModelError, naming the path or the missing package, when there is no usable checkpoint.
    """
    if model.source == "oracle":
        return None
    if model.source == "demo":
        return await _import_demo(progress)
    return _folder(model.source)


def _folder(source: str) -> Path:
    path = Path(source).expanduser().absolute()
    if not path.is_dir():
        raise ModelError(f"model.source: {path}: no such folder; give the folder that holds config.json and the weights")
    return path


async def _import_demo(progress: Callable[[str], None]) -> Path:
    tool = await asyncio.create_subprocess_exec(
        sys.executable, "-m", TOOL_MODULE, "import", "--json", "--cache", str(model_cache_dir()),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, env=child_environment(),
    )  # fmt: skip
    assert tool.stdout is not None
    path: Path | None = None
    failure: ModelError | None = None
    try:
        async for line in tool.stdout:
            event = json.loads(line)
            match event.get("event"):
                case "progress" if event["done"] == event["total"]:
                    progress(f"importing the demo model: {event['stage']} done")
                case "error":
                    error = error_from(event["reason"], event["message"])
                    failure = error if isinstance(error, ModelError) else ModelError(error.message)
                case "done":
                    path = Path(event["path"])
                case _:
                    pass
        code = await tool.wait()
    finally:
        if tool.returncode is None:
            tool.kill()
            await tool.wait()
    if failure is not None:
        raise failure
    if path is None:
        raise ModelError(
            f"the import of the demo model ended with code {code}; `autan model import` shows why, `oracle` works without"
        )
    return path
