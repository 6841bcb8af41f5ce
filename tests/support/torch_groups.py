"""A torch engine whose ranks are threads of this process: the product's own parts, without the processes around them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.schema.pools import ModelConfig
from tests.support.torch_models import an_engine, engine_config
from workers.engine_api.group import GroupDoor, GroupPlace
from workers.engine_api.protocol import Engine
from workers.engines.torch.build_group import create_follower, create_head
from workers.engines.torch.follower import EngineFollower

TIMEOUT_S = 10.0


class ThreadedRank:
    """A rank above 0 on a thread; `error` is how it ended."""

    def __init__(self, follower: EngineFollower, door: GroupDoor) -> None:
        self.follower = follower
        self.error: BaseException | None = None
        self._door = door
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.follower.connect(self._door.address, self._door.token)
            self.follower.serve()
        except BaseException as error:
            self.error = error


@contextmanager
def a_group(
    model_dir: Path, ranks: int, dtype: str = "float32", *, deterministic: bool = False, **fields: Any
) -> Iterator[tuple[Engine, list[ThreadedRank]]]:
    """An engine over so many ranks, and the ones above 0; they must have ended in order unless a test took care of them."""
    model = ModelConfig(name="tiny", source=str(model_dir), dtype=dtype, deterministic=deterministic)
    engine = engine_config(**fields)
    if ranks == 1:
        alone = an_engine(model_dir, dtype, **fields)
        yield alone, []
        alone.close()
        return
    places = [GroupPlace(rank=rank, ranks=ranks, step_timeout_s=TIMEOUT_S) for rank in range(ranks)]
    head, door = create_head(model, engine, model_dir, places[0])
    others = [ThreadedRank(create_follower(model, engine, model_dir, place), door) for place in places[1:]]
    try:
        door.connect()
        yield head, others
    finally:
        head.close()
        for other in others:
            other.thread.join(TIMEOUT_S)
            other.follower.close()
            assert not other.thread.is_alive(), "a rank outlived its group"
