"""What a view does not say of its queue: which instances have the first KV blocks of each request.

The blocks of a request are named here, in the process of the leader, from the tokens that Redis has: names depend on the
weights of the instances, which the ingress need not know, and after the death of a worker they cover the journaled tokens
too. Each request is read and named once for each placement it waits for, not in each turn: what is known is kept, within
`BUDGET_NAMES`. Naming takes about 1 µs a block and the read 4 bytes a token; a request that would need more than is left of
a turn's share is named in a later one, and until then counts as known to nobody.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from orchestrator.control.prefix_index import PrefixIndex
from orchestrator.domain.ids import Epoch, InstanceId, RequestId
from orchestrator.domain.instance import InstanceView
from orchestrator.domain.view import ClusterView, QueuedRequest
from orchestrator.runtime.cache_watch import CacheWatch
from orchestrator.store.client import Store
from protos.contract.block_hash import packed_block_hashes, root_hash, unpack_names
from protos.contract.errors import AutanError
from protos.rpc import Dialer
from protos.wire import common

logger = logging.getLogger(__name__)

BUDGET_NAMES = 1_048_576  # 16 MiB of names of waiting requests
TURN_REQUESTS = 64
TURN_TOKENS = 524_288
_MAX_HOLDERS = 64  # told of one request, those with the most blocks


@dataclass(frozen=True, slots=True)
class _Serving:
    """What decides how the blocks of a model are named, and who has blocks of such names."""

    weights_digest: str
    block_tokens: int
    instances: frozenset[InstanceId]


_Key = tuple[RequestId, Epoch, int, str, int]


class PrefixFacts:
    """Completes views. Follows the caches of the instances that the views show, until `close`."""

    def __init__(self, store: Store, dialer: Dialer | None = None) -> None:
        self.index = PrefixIndex()
        self.watch = CacheWatch(self.index, dialer)
        self._store = store
        self._names: OrderedDict[_Key, list[bytes]] = OrderedDict()
        self._kept = 0

    async def complete(self, view: ClusterView) -> ClusterView:
        """The view, with what is known of its requests' blocks. Never raises for want of it: then less is known."""
        self.watch.follow(view.instances)
        if not len(self.index) or not view.queued:
            return view
        serving = _serving(view.instances)
        try:
            await self._read_names(view.queued, serving)
        except AutanError as error:
            logger.info("the prompts of the queue cannot be read: %s", error)
        queued = tuple(self._with_holders(request, serving.get(request.model)) for request in view.queued)
        return replace(view, queued=queued)

    async def close(self) -> None:
        """Follows nobody any more. Idempotent."""
        await self.watch.close()

    def _with_holders(self, request: QueuedRequest, serving: _Serving | None) -> QueuedRequest:
        names = None if serving is None else self._names.get(_key(request, serving))
        if not names or serving is None:
            return request
        found = self.index.overlaps(names)
        holders = sorted(
            ((name, blocks) for name, blocks in found.items() if name in serving.instances), key=lambda one: (-one[1], one[0])
        )
        return replace(request, cached=tuple(holders[:_MAX_HOLDERS]))

    async def _read_names(self, queued: Sequence[QueuedRequest], serving: dict[str, _Serving]) -> None:
        wanted: list[tuple[QueuedRequest, _Serving]] = []
        tokens_left = TURN_TOKENS
        for request in queued:
            of = serving.get(request.model)
            if of is None or request.prefill_tokens <= of.block_tokens or _key(request, of) in self._names:
                continue
            tokens_left -= request.prefill_tokens
            if len(wanted) == TURN_REQUESTS or (wanted and tokens_left < 0):
                break
            wanted.append((request, of))
        if not wanted:
            return
        prompts = await self._store.prompts([request.request_id for request, _ in wanted])
        for (request, of), (spec, journal) in zip(wanted, prompts, strict=True):
            self._keep(_key(request, of), _names_of(request, of, spec, journal))

    def _keep(self, key: _Key, names: list[bytes]) -> None:
        self._names[key] = names
        self._kept += len(names) + 1
        while self._kept > BUDGET_NAMES:
            _, dropped = self._names.popitem(last=False)
            self._kept -= len(dropped) + 1


def _key(request: QueuedRequest, serving: _Serving) -> _Key:
    return (request.request_id, request.epoch, request.output_tokens, serving.weights_digest, serving.block_tokens)


def _serving(instances: Sequence[InstanceView]) -> dict[str, _Serving]:
    """By model: the fingerprint that most of its instances have; the others are set apart and get no work."""
    counts: dict[str, Counter[str]] = {}
    for one in instances:
        if one.capabilities is not None:
            counts.setdefault(one.capabilities.model, Counter())[one.capabilities.fingerprint] += 1
    found: dict[str, _Serving] = {}
    for model, prints in counts.items():
        fingerprint = min(prints, key=lambda name: (-prints[name], name))
        members = [one for one in instances if one.capabilities is not None and one.capabilities.fingerprint == fingerprint]
        capabilities = members[0].capabilities
        if capabilities is not None:
            names = frozenset(one.instance_id for one in members)
            found[model] = _Serving(capabilities.weights_digest, capabilities.block_tokens, names)
    return found


def _names_of(request: QueuedRequest, serving: _Serving, spec: bytes, journal: bytes) -> list[bytes]:
    """The names of the request's full blocks; none when the stored bytes are not what they should be."""
    try:
        parsed = common.RequestSpec.FromString(spec)
    except DecodeError:
        return []
    if parsed.request_id != request.request_id:
        return []
    root = root_hash(serving.weights_digest, parsed.cache_salt)
    return unpack_names(packed_block_hashes(root, parsed.prompt_token_ids + journal, serving.block_tokens))
