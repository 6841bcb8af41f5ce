"""What the listeners let in: bad messages, keys, limits, addresses."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from configs.schema.network import IngressConfig, NetworkConfig
from orchestrator.cli.status import kv_note
from orchestrator.ingress.auth import METHOD_ROLES, Role, key_digest
from orchestrator.ingress.server import IngressServer
from protos.contract.errors import (
    AutanError,
    CapacityError,
    ConfigError,
    Forbidden,
    InvalidRequest,
    Unauthenticated,
    UnknownRequest,
)
from protos.rpc import admin_pb2_grpc, error_of, inference_pb2_grpc, open_channel, tokens_pb2_grpc
from protos.wire import admin, inference, tokens
from tests.support.ingress_worker import expected_tokens
from tests.support.ingress_world import Answer, World, a_prompt, a_server, a_world, until
from tests.support.store import FreshStore
from tests.unit.orchestrator.ingress.corpus import BAD, GOOD

Scenario = Callable[[World], Awaitable[None]]


def run(store: FreshStore, scenario: Scenario, config: IngressConfig | None = None, **settings: object) -> None:
    """Runs a scenario in a world of its own, within a deadline."""

    async def body() -> None:
        async with asyncio.timeout(40), a_world(store.url, store.cluster, config, **settings) as world:
            await scenario(world)

    asyncio.run(body())


async def refused(work: Awaitable[object]) -> AutanError:
    """The error of the tree with which a call ends."""
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await work
    return error_of(failed.value)


async def submitted(world: World) -> int:
    """How many requests were ever accepted."""
    return (await world.store.stats()).totals["submitted"]


def test_the_corpus_of_the_validator_through_the_server(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        for name, (request, expected) in BAD.items():
            error = await refused(world.ask(request))
            assert type(error) is expected, f"{name}: {error!r}"
        assert await submitted(world) == 0
        for name, request in GOOD.items():
            request.request_id = ""
            answer = await world.ask(request)
            assert answer.finished is not None, name
        assert await submitted(world) == len(GOOD)

    run(fresh_store, scenario)


def test_garbage_is_an_invalid_argument_and_hurts_nobody(fresh_store: FreshStore) -> None:
    garbage = {
        "random": bytes(range(255, 0, -1)),
        "truncated": a_prompt("r-1").SerializeToString()[:-3],
        "wrong wire type": b"\x0d\x01\x02\x03",
        "no UTF-8": b"\x12\x02\xff\xfe",
        "endless varint": b"\xff" * 64,
        "deep nesting": b"\x22\x7f" * 60,
    }

    async def scenario(world: World) -> None:
        for service, method in (("Inference", "Generate"), ("Inference", "Resume")):
            call = world.channel.unary_stream(f"/autan.v1.{service}/{method}")
            for name, data in garbage.items():
                error = await refused(call(data).read())
                assert type(error) is InvalidRequest, f"{method} {name}: {error!r}"
                assert "Error" not in error.message
        unary = world.channel.unary_unary("/autan.v1.Inference/Tokenize")
        assert type(await refused(unary(garbage["random"]))) is InvalidRequest
        huge = inference.GenerateRequest(text="x" * (9 * 1024 * 1024))
        wide = open_channel(world.ingress.address, [("grpc.max_send_message_length", -1)])
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await inference_pb2_grpc.InferenceStub(wide).Generate(huge).read()  # type: ignore[no-untyped-call]
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await wide.close()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await world.channel.unary_unary("/autan.v1.Inference/Unheard")(b"")
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert await submitted(world) == 0
        assert (await world.ask(a_prompt("r-1"))).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


def test_bytes_that_are_no_grpc_at_all(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        host, port = world.ingress.address.rsplit(":", 1)
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 4096, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100):
            _reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(data)
            await writer.drain()
            writer.close()
        assert (await world.ask(a_prompt("r-1"))).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


def keys_config(tmp_path: Path, **fields: object) -> IngressConfig:
    """An ingress with the keys alice (client), bob (client of another tenant), root (admin) and old (expired)."""
    entries: list[dict[str, str]] = [
        {
            "id": name,
            "sha256": key_digest(f"key-{name}"),
            "tenant": f"t-{name}",
            "role": "admin" if name == "root" else "client",
        }
        for name in ("alice", "bob", "root", "old")
    ]
    entries[3]["expires_at"] = "2020-01-01T00:00:00Z"
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    path.chmod(0o600)
    return IngressConfig(address="127.0.0.1:0", keys_file=str(path), default_max_tokens=8, **fields)  # type: ignore[arg-type]


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    """The metadata that presents a key."""
    return (("authorization", f"Bearer key-{name}"),)


def test_every_method_of_the_server_needs_its_key(
    fresh_store: FreshStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered: set[str] = set()
    make = grpc.aio.server

    def recording(*args: Any, **options: Any) -> Any:
        server = make(*args, **options)
        add = server.add_registered_method_handlers

        def record(service: str, handlers: dict[str, Any]) -> None:
            registered.update(f"/{service}/{name}" for name in handlers)
            add(service, handlers)

        monkeypatch.setattr(server, "add_registered_method_handlers", record)
        return server

    monkeypatch.setattr(grpc.aio, "server", recording)

    async def code(world: World, method: str, metadata: Any) -> AutanError | None:
        call = world.channel.unary_stream(method)(b"", metadata=metadata)
        try:
            await asyncio.wait_for(call.read(), 5)
        except grpc.aio.AioRpcError as error:
            return error_of(error)
        finally:
            call.cancel()
        return None

    async def scenario(world: World) -> None:
        served = registered - {"/autan.v1.TokenSink/Deliver"}
        assert served == set(METHOD_ROLES), "every method is listed with its role, and nothing else is"
        for method in sorted(served):
            for metadata in ((), bearer("nobody"), bearer("old"), (("authorization", "key-alice"),)):
                assert type(await code(world, method, metadata)) is Unauthenticated, method
            reached = await code(world, method, bearer("alice"))
            if METHOD_ROLES[method] is Role.ADMIN:
                assert type(reached) is Forbidden, method
            else:
                assert not isinstance(reached, Unauthenticated | Forbidden), method
            assert not isinstance(await code(world, method, bearer("root")), Unauthenticated | Forbidden), method
        assert world.shutdowns == [0.0], "only the admin's call reached Shutdown"
        assert await submitted(world) == 0

    run(fresh_store, scenario, keys_config(tmp_path))
    assert "unexpected error" not in caplog.text
    assert "key-alice" not in caplog.text and key_digest("key-alice") not in caplog.text


def test_clients_do_not_reach_the_workers_listener_nor_workers_the_clients(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        for address, method in (
            (world.ingress.address, "/autan.v1.TokenSink/Deliver"),
            (world.ingress.sink_address, "/autan.v1.Inference/Generate"),
            (world.ingress.sink_address, "/autan.v1.Admin/Shutdown"),
        ):
            async with open_channel(address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await channel.unary_unary(method)(b"")
                assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert world.shutdowns == []

    run(fresh_store, scenario)


def test_a_tenant_sees_its_own_requests_only(fresh_store: FreshStore, tmp_path: Path) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(3)
        answer = Answer()
        call = asyncio.create_task(world.ask(a_prompt("r-1"), answer, metadata=bearer("alice")))
        await until(lambda: len(answer.ids) == 3, "alice reads")
        api, bob = world.inference, bearer("bob")
        resume, cancel = inference.ResumeRequest(request_id="r-1"), inference.CancelRequest(request_id="r-1")
        assert type(await refused(api.Resume(resume, metadata=bob).read())) is UnknownRequest
        assert type(await refused(api.Cancel(cancel, metadata=bob))) is UnknownRequest
        theirs = await refused(api.Generate(a_prompt("r-1"), metadata=bob).read())
        assert theirs.code == "ALREADY_EXISTS"
        world.worker.allow(99)
        assert (await call).ids == expected_tokens(11, 8)
        assert type(await refused(api.Resume(resume, metadata=bob).read())) is UnknownRequest
        listed = await world.admin.ListRequests(admin.ListRequestsRequest(), metadata=bearer("root"))
        assert list(listed.requests) == []

    run(fresh_store, scenario, keys_config(tmp_path))


def test_more_streams_than_allowed_come_back_later(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(1)
        calls = [asyncio.create_task(world.ask(a_prompt(f"r-{n}"))) for n in range(2)]
        await until(lambda: world.ingress.parts.service.open_streams == 2, "two streams are open")
        error = await refused(world.ask(a_prompt("r-9")))
        assert type(error) is CapacityError and error.retry_after_s > 0
        world.worker.allow(99)
        await asyncio.gather(*calls)
        assert (await world.ask(a_prompt("r-9"))).finished is not None

    run(fresh_store, scenario, IngressConfig(address="127.0.0.1:0", max_streams=2, default_max_tokens=8))


def test_a_worker_that_sends_rubbish_hurts_only_itself(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        world.worker.allow(2)
        answers = [Answer(), Answer()]
        calls = [asyncio.create_task(world.ask(a_prompt(f"r-{n}"), answers[n])) for n in range(2)]
        await until(lambda: all(len(answer.ids) == 2 for answer in answers), "both run")
        sink = world.ingress.sink_address
        one = tokens.RequestTokens(request_id="r-0", epoch=1, first_index=2, token_ids=b"\0\0\0\0")
        rubbish = {
            "odd bytes": tokens.TokenBatch(
                instance_id="w", requests=[tokens.RequestTokens(request_id="r-0", token_ids=b"123")]
            ),
            "bad instance": tokens.TokenBatch(instance_id="{w}", requests=[one]),
            "bad id": tokens.TokenBatch(instance_id="w", requests=[one, tokens.RequestTokens(request_id="a:b")]),
            "too many": tokens.TokenBatch(instance_id="w", requests=[one] * 1025),
        }
        for name, batch in rubbish.items():
            async with open_channel(sink) as channel:
                call = tokens_pb2_grpc.TokenSinkStub(channel).Deliver(iter([batch]))  # type: ignore[no-untyped-call]
                assert type(await refused(call.read())) is InvalidRequest, name
        assert world.ingress.parts.table.get("r-0").stream.accepted == 2  # type: ignore[union-attr]
        outside = tokens.RequestTokens(request_id="r-0", epoch=1, first_index=2, token_ids=b"\xff\xff\0\0")
        world.worker.send(sink, outside)
        assert (await refused(calls[0])).reason == "ENGINE_FAILURE"
        await until(lambda: "r-0" in world.worker.revoked, "the worker is told to drop it")
        world.worker.allow(99)
        assert (await calls[1]).ids == expected_tokens(11, 8)

    run(fresh_store, scenario)


async def serving(world: World, service: str) -> bool:
    """The answer of the health service."""
    check = health_pb2_grpc.HealthStub(world.channel).Check
    reply = await check(health_pb2.HealthCheckRequest(service=service))
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def test_status_health_drain_and_the_small_calls(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        await until(lambda: serving(world, "autan.v1.Inference"), "it serves")
        await world.ask(a_prompt("r-1"))
        status = await world.admin.Status(admin.StatusRequest())
        assert (status.cluster, status.version, status.finished, status.store_reachable) == (world.cluster, "0-test", 1, True)
        (instance,) = status.instances
        assert (instance.instance_id, instance.node, instance.card.total_blocks, instance.stats.free_blocks) == (
            "w-0",
            "here",
            64,
            64,
        )
        assert status.counters["tokens_accepted"] == 8 and status.counters["ttft_count"] == 1
        (model,) = (await world.inference.ListModels(inference.ListModelsRequest())).models
        assert (model.name, model.architecture, model.vocab_size, model.has_chat_template) == ("oracle", "oracle", 259, True)
        reply = await world.inference.Tokenize(inference.TokenizeRequest(text="hé"))
        assert list(reply.ids) == [3 + byte for byte in "hé".encode()]
        chat = inference.Chat(messages=[inference.ChatMessage(role="user", content="hi")])
        reply = await world.inference.Tokenize(inference.TokenizeRequest(chat=chat))
        assert bytes(i - 3 for i in reply.ids) == b"user: hi\nassistant:"
        for bad in (
            inference.TokenizeRequest(),
            inference.TokenizeRequest(text=""),
            inference.TokenizeRequest(model="x", text="a"),
        ):
            assert (await refused(world.inference.Tokenize(bad))).code in ("INVALID_ARGUMENT", "NOT_FOUND")
        assert (await refused(world.admin.ListRequests(admin.ListRequestsRequest(limit=1001)))).code == "INVALID_ARGUMENT"
        assert (await refused(world.admin.Shutdown(admin.ShutdownRequest(grace_s=float("nan"))))).code == "INVALID_ARGUMENT"
        await world.ingress.drain()
        assert not await serving(world, "")
        assert (await refused(world.ask(a_prompt("r-2")))).code == "UNAVAILABLE"
        assert await world.ingress.wait_idle(5.0)

    run(fresh_store, scenario)


def test_addresses_that_cannot_be_used(fresh_store: FreshStore, tmp_path: Path) -> None:
    def server(world: World, address: str, network: NetworkConfig | None = None) -> IngressServer:
        world.settings = type(world.settings)(config=IngressConfig(address=address), version="0", ingress_id="other")
        world.network = network or NetworkConfig()
        return a_server(world)

    async def scenario(world: World) -> None:
        shared = tmp_path / "shared"
        shared.mkdir(mode=0o755)
        shared.chmod(0o755)
        (tmp_path / "private").mkdir(mode=0o700)
        (tmp_path / "private" / "file").write_text("")
        cases = {
            world.ingress.address: "in use by another process",
            "0.0.0.0:0": "needs TLS",
            "192.0.2.1:50600": "needs TLS",
            f"unix://{shared}/s": "yours alone",
            f"unix://{tmp_path}/private/file": "is no socket",
        }
        for address, words in cases.items():
            with pytest.raises(ConfigError, match=words):
                await server(world, address).start()
        with pytest.raises(ConfigError, match="keys_file"):
            await server(world, "0.0.0.0:0", NetworkConfig(insecure=True)).start()
        assert (await world.ask(a_prompt("r-1"))).ids == expected_tokens(11, 8), "the running one is not disturbed"

        path = tmp_path / "private" / "api.sock"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
        first = server(world, f"unix://{path}")
        await first.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with open_channel(first.address) as channel:
            stub = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            assert (await stub.Status(admin.StatusRequest())).cluster == world.cluster
        with pytest.raises(ConfigError, match="in use"):
            await server(world, f"unix://{path}").start()
        await first.stop(0.0)

    run(fresh_store, scenario)


def test_the_status_says_when_hand_offs_change_tokens(fresh_store: FreshStore) -> None:
    async def scenario(world: World) -> None:
        for compression, noted in (("none", False), ("lossless", False), ("fp8", True)):
            world.network = NetworkConfig(kv_compression=compression)
            await world.restart_ingress()
            reply = await world.admin.Status(admin.StatusRequest())
            assert reply.counters.get(f"kv_compression_{compression}", 0) == (compression != "none")
            assert bool(kv_note(reply)) is noted

    run(fresh_store, scenario)
