"""The client itself: one connection, streams that survive its loss."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Self

import grpc
import grpc.aio

from configs import env
from orchestrator.client.endpoint import dialer_to, find_endpoint, find_tls
from orchestrator.client.messages import (
    Collector,
    Completion,
    Event,
    Turn,
    event_of,
    generate_request,
)
from orchestrator.client.progress import Progress
from protos.contract.errors import (
    AutanError,
    ClusterUnreachable,
    InvalidRequest,
    PeerUnavailable,
    UnavailableError,
    UnknownRequest,
)
from protos.rpc import admin_pb2_grpc, error_of, inference_pb2_grpc
from protos.tls_files import TlsFiles
from protos.wire import admin, inference

_BACKOFF_S = (0.05, 1.0)
_GIVE_UP_S = 1.0


class AsyncClient:
    """A connection to one cluster, for one event loop. Close it, or use it as a context.

    `retry_s`: for so long without progress a stream is resumed, and a submit repeated, before the error is raised.
    `timeout_s`: for calls that are not streams. `tls`: the CA of a server that has TLS, and what to show it; by default what
    goes with the endpoint in the environment, `TlsFiles()` for none.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        api_key: str | None = None,
        tls: TlsFiles | None = None,
        retry_s: float = 10.0,
        timeout_s: float = 10.0,
    ) -> None:
        self.endpoint = endpoint or find_endpoint()
        if tls is None:
            tls = find_tls() if endpoint is None else TlsFiles(*env.client_tls())
        self._dialer = dialer_to(self.endpoint, tls)
        self._generation = self._dialer.generation
        key = api_key if api_key is not None else env.api_key()
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        self._channel: grpc.aio.Channel | None = None
        self._retired: list[grpc.aio.Channel] = []  # opened with certificates that were replaced; streams may be open on them

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; open streams end with it. Idempotent."""
        self._retire()
        while self._retired:
            await self._retired.pop().close()

    def generate(self, text: str | None = None, **options: Any) -> AsyncGenerator[Event, None]:
        """Accepted, the tokens as they come, Finished; see generate_request for the options.

        Closing the generator early cancels the request. Raises the error with which the request ended.
        """
        request = generate_request(text, **options)
        return self._resumed(request, request.request_id, 0)

    def resume(self, request_id: str, from_index: int = 0) -> AsyncGenerator[Event, None]:
        """The stream of an accepted request from a token on."""
        return self._resumed(None, request_id, from_index)

    async def complete(self, text: str | None = None, **options: Any) -> Completion:
        """The whole answer; see generate_request for the options. Raises InvalidRequest for several of them."""
        if options.get("n", 1) != 1:
            raise InvalidRequest(f"n: {options['n']} answers do not fit one; ask complete_all")
        (answer,) = await self.complete_all(text, **options)
        return answer

    async def complete_all(self, text: str | None = None, **options: Any) -> list[Completion]:
        """The whole answers of all `n` choices, in their order."""
        collector = Collector()
        async for event in self.generate(text, **options):
            collector.take(event)
        return [completion for _, completion in sorted(collector.done.items())]

    async def cancel(self, request_id: str) -> str:
        """Cancels a request of the key's tenant; returns its state after the call. Idempotent."""
        reply = await self._call(self._inference().Cancel, inference.CancelRequest(request_id=request_id))
        return str(reply.state)

    async def tokenize(self, text: str | None = None, *, messages: Sequence[Turn] | None = None) -> list[int]:
        """The prompt tokens that generate would use."""
        prompt = generate_request(text, messages=messages)
        request = inference.TokenizeRequest()
        if text is not None:
            request.text = prompt.text
        else:
            request.chat.CopyFrom(prompt.chat)
        return list((await self._call(self._inference().Tokenize, request)).ids)

    async def models(self) -> list[inference.Model]:
        """The models that are served."""
        return list((await self._call(self._inference().ListModels, inference.ListModelsRequest())).models)

    async def status(self) -> admin.StatusReply:
        """Instances, totals, counters. For admins, like all methods from here on."""
        reply: admin.StatusReply = await self._call(self._admin().Status, admin.StatusRequest())
        return reply

    async def requests(self, limit: int = 100) -> list[admin.RequestStatus]:
        """Live requests of all tenants, oldest first."""
        return list((await self._call(self._admin().ListRequests, admin.ListRequestsRequest(limit=limit))).requests)

    async def cancel_any(self, request_id: str) -> str:
        """Cancels a request of any tenant; returns its state after the call."""
        reply = await self._call(self._admin().CancelRequest, admin.AdminCancelRequest(request_id=request_id))
        return str(reply.state)

    async def migrate(self, request_id: str, target_instance: str) -> int:
        """Begins to move a running request to another decode instance; returns the epoch of the move."""
        message = admin.MigrateRequest(request_id=request_id, target_instance=target_instance)
        return int((await self._call(self._admin().Migrate, message)).epoch)

    async def drain(self, instance_id: str, on: bool = True) -> list[str]:
        """An instance takes no new work, or takes it again; returns the requests that move away."""
        return list((await self._call(self._admin().Drain, admin.DrainRequest(instance_id=instance_id, on=on))).moving)

    async def shutdown(self, grace_s: float = 30.0) -> None:
        """Asks the cluster to drain and stop; returns at once."""
        await self._call(self._admin().Shutdown, admin.ShutdownRequest(grace_s=grace_s))

    async def list_kv(self, instance_ids: Sequence[str] = ()) -> admin.ListKvReply:
        """Who owns which KV blocks, on these instances or all that are alive."""
        reply: admin.ListKvReply = await self._call(self._admin().ListKv, admin.ListKvRequest(instance_ids=instance_ids))
        return reply

    async def verify_kv(self, instance_ids: Sequence[str] = ()) -> admin.VerifyKvReply:
        """The books of KV blocks against the engines."""
        reply: admin.VerifyKvReply = await self._call(self._admin().VerifyKv, admin.VerifyKvRequest(instance_ids=instance_ids))
        return reply

    async def collect_kv(self, instance_ids: Sequence[str] = (), apply: bool = False) -> admin.CollectKvReply:
        """Gives back KV blocks that provably nobody owns; only says so unless `apply`."""
        request = admin.CollectKvRequest(instance_ids=instance_ids, apply=apply)
        reply: admin.CollectKvReply = await self._call(self._admin().CollectKv, request)
        return reply

    async def diagnose(self) -> admin.DiagnoseReply:
        """Who reaches whom, and who may hand over to whom."""
        reply: admin.DiagnoseReply = await self._call(self._admin().Diagnose, admin.DiagnoseRequest())
        return reply

    async def _resumed(
        self, request: inference.GenerateRequest | None, request_id: str, from_index: int
    ) -> AsyncGenerator[Event, None]:
        """One stream over as many connections as it takes. `request` is sent until it is accepted; then it is resumed.

        Several choices cannot be resumed as one: their request is sent again, and what is known of them is left out.
        """
        unsent, progress = request, Progress(from_index, 1 if request is None else max(1, request.n))
        attempt, progress_at_s = 0, time.monotonic()
        broken: UnavailableError | None = None
        while True:
            progress.connect()
            try:
                async with aclosing(self._events(unsent, request_id, progress.next_index)) as events:
                    async for event in events:
                        attempt, progress_at_s = 0, time.monotonic()
                        fresh = progress.take(event)
                        if progress.is_resumable:
                            unsent = None
                        if progress.is_over:
                            request = None  # nothing is left to give up
                        if fresh is not None:
                            yield fresh
                        if progress.is_over:
                            return
                raise PeerUnavailable(f"{self.endpoint}: the stream of {request_id} broke off")
            except UnknownRequest as error:
                if broken is not None and progress.is_announced:
                    raise broken from error  # accepted, then lost: the break says why
                raise
            except UnavailableError as error:
                broken = error
                delay_s = max(error.retry_after_s, min(_BACKOFF_S[1], _BACKOFF_S[0] * 2**attempt))
                if time.monotonic() + delay_s - progress_at_s > self._retry_s:
                    raise self._unreachable(error) from error
            except (GeneratorExit, asyncio.CancelledError):
                if request is not None and progress.is_announced:
                    await self._give_up(request_id)
                raise
            attempt += 1
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))

    async def _give_up(self, request_id: str) -> None:
        with suppress(AutanError, TimeoutError):
            async with asyncio.timeout(_GIVE_UP_S):
                await self.cancel(request_id)

    async def _events(
        self, request: inference.GenerateRequest | None, request_id: str, next_index: int
    ) -> AsyncGenerator[Event, None]:
        stub = self._inference()
        if request is not None:
            call = stub.Generate(request, metadata=self._metadata)
        else:
            wanted = inference.ResumeRequest(request_id=request_id, from_index=next_index)
            call = stub.Resume(wanted, metadata=self._metadata)
        try:
            async for event in call:
                yield event_of(event)
        except grpc.RpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._unreachable(error_of(error)) from error

    def _unreachable(self, error: AutanError) -> AutanError:
        if type(error) is PeerUnavailable:  # no answer of the cluster, but of gRPC
            hint = "" if self._dialer.trust else f" (where it has TLS: is {env.TLS_CA} set?)"
            return ClusterUnreachable(f"{self.endpoint}: no cluster answers ({error.message}); is `autan up` running?{hint}")
        return error

    def _inference(self) -> Any:
        return inference_pb2_grpc.InferenceStub(self._open())  # type: ignore[no-untyped-call]

    def _admin(self) -> Any:
        return admin_pb2_grpc.AdminStub(self._open())  # type: ignore[no-untyped-call]

    def _open(self) -> grpc.aio.Channel:
        if self._generation != self._dialer.generation:
            self._retire()
            self._generation = self._dialer.generation
        if self._channel is None:
            self._channel = self._dialer.open(self.endpoint)
        return self._channel

    def _retire(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            self._retired.append(channel)
