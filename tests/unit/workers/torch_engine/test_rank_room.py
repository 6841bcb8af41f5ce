"""An engine of several ranks has no room that one process can look into; bytes go to every rank through `import_kv`."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.contract.errors import BadFrame
from tests.support.torch_groups import a_group
from tests.support.torch_models import random_tokens
from workers.engine_api.types import EngineRequest, KvPlace, SamplingParams
from workers.engines.torch.tiny import write_tiny


@pytest.mark.parametrize(("ranks", "has_room"), [(1, True), (2, False)])
def test_only_a_process_that_has_the_whole_pool_has_room(tmp_path: Path, ranks: int, has_room: bool) -> None:
    folder = write_tiny("llama", tmp_path / "model", 3)
    with a_group(folder, ranks) as (engine, _):
        tokens = tuple(random_tokens(1, 40))
        request = EngineRequest(request_id="r", epoch=1, prompt=tokens, sampling=SamplingParams(max_tokens=2))
        place = KvPlace(engine.import_begin(request, len(tokens)).block_ids[0], 0, 0, 8)
        room = engine.import_room((place,))
        assert (room is not None) is has_room
        for wrong in (place._replace(group=engine.layout.num_groups), place._replace(block_id=engine.stats().total_blocks)):
            with pytest.raises(BadFrame):
                engine.import_room((wrong,))
        engine.import_kv(place.block_id, 0, 0, memoryview(b"\1" * 8))
        if room is not None:
            assert bytes(room.views[0]) == b"\1" * 8
        assert engine.import_abort("r", 1)
        with pytest.raises(BadFrame):
            engine.import_room((place,))
