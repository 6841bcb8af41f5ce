"""`autan kv ls | verify | gc`: the books of KV blocks of every instance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from orchestrator.cli.connect import Cluster, Json, Timeout, with_client
from orchestrator.cli.output import print_json, print_table, stdout
from protos.wire import admin, audit

app = typer.Typer(help="Who owns which KV blocks; exit code 1 when something is wrong or an instance does not answer.")

Instances = Annotated[list[str] | None, typer.Argument(metavar="[INSTANCE]...", help="Only these; all that are alive if none.")]


def message_json(message: Any) -> dict[str, Any]:
    """A message with its own field names; 64-bit numbers stay numbers."""
    return {
        key: int(value) if key in _NUMBERS else value
        for key, value in MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        ).items()
    }


_NUMBERS = frozenset({"epoch", "incarnation", "opened", "released", "host_bytes", "disk_bytes", "bytes"})


def books_json(books: audit.KvBooks) -> dict[str, Any]:
    """The books of one instance as `--json` prints them."""
    return {**message_json(books), "entries": [message_json(entry) for entry in books.entries]}


@app.command("ls")
def ls(instances: Instances = None, cluster: Cluster = None, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Show every owner of KV blocks: requests, and transfers while their bytes are in flight."""
    reply = with_client(lambda client: client.list_kv(instances or ()), cluster, timeout)
    if as_json:
        print_json({"instances": [books_json(one) for one in reply.books], "unanswered": unanswered_json(reply.unanswered)})
    else:
        _print_entries(reply.books)
        _print_books(reply.books)
        _print_unanswered(reply.unanswered)
    _exit(bool(reply.unanswered))


@app.command("verify")
def verify(instances: Instances = None, cluster: Cluster = None, timeout: Timeout = 10.0, as_json: Json = False) -> None:
    """Compare the books of every worker with its engine, and check some blocks of its disk cache. Exit code 1 on findings."""
    reply = with_client(lambda client: client.verify_kv(instances or ()), cluster, timeout)
    if as_json:
        audits = [
            {
                "instance_id": one.books.instance_id,
                "books": books_json(one.books),
                "findings": [message_json(found) for found in one.findings],
                "took_s": one.took_s,
                "disk_checked": one.disk_checked,
            }
            for one in reply.audits
        ]
        print_json({"instances": audits, "unanswered": unanswered_json(reply.unanswered)})
    else:
        _print_books([one.books for one in reply.audits])
        for one in reply.audits:
            for found in one.findings:
                where = f"{found.request_id} epoch {found.epoch}: " if found.request_id else ""
                stdout.print(f"{one.books.instance_id}: {found.kind}: {where}{found.detail}", markup=False)
        _print_unanswered(reply.unanswered)
    _exit(bool(reply.unanswered) or any(one.findings for one in reply.audits))


@app.command("gc")
def gc(
    instances: Instances = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without it, only say what would be done.")] = False,
    cluster: Cluster = None,
    timeout: Timeout = 10.0,
    as_json: Json = False,
) -> None:
    """Give back KV blocks that provably nobody owns: their lease is over and Redis knows no such live request.

    Removes disk caches of instances that are gone for ten minutes as well, on the nodes that are asked.
    """
    reply = with_client(lambda client: client.collect_kv(instances or (), apply), cluster, timeout)
    if as_json:
        collections = [
            {**message_json(one), "returns": [message_json(back) for back in one.returns]} for one in reply.collections
        ]
        print_json({"instances": collections, "unanswered": unanswered_json(reply.unanswered)})
    else:
        for one in reply.collections:
            for back in one.returns:
                _print_return(one.instance_id, back)
        if not any(one.returns for one in reply.collections):
            stdout.print("nothing to give back")
        _print_unanswered(reply.unanswered)
    _exit(bool(reply.unanswered))


def unanswered_json(unanswered: Iterable[admin.Unanswered]) -> list[dict[str, Any]]:
    """Instances that could not be asked, and why."""
    return [
        {"instance_id": one.instance_id, "address": one.address, "reason": one.error.reason, "message": one.error.message}
        for one in unanswered
    ]


def _print_entries(books: Iterable[audit.KvBooks]) -> None:
    print_table(
        ("instance", "request", "epoch", "owner", "stage", "blocks", "writer", "age", "lease left"),
        [
            (
                one.instance_id, entry.request_id, entry.epoch, entry.owner, entry.stage, entry.blocks, entry.writer or "-",
                f"{entry.age_s:.1f} s",
                f"{entry.lease_left_s:.1f} s" if entry.HasField("lease_left_s") else "-",
            )
            for one in books
            for entry in one.entries
        ],
    )  # fmt: skip


def _print_books(books: Iterable[audit.KvBooks]) -> None:
    print_table(
        (
            "instance", "incarnation", "total", "used", "cached", "free", "host", "disk", "leaked", "overdue", "opened",
            "released",
        ),
        [
            (
                one.instance_id, one.incarnation, one.total_blocks, one.used_blocks, one.cached_blocks, one.free_blocks,
                _tier(one.host_blocks, one.host_bytes), _tier(one.disk_blocks, one.disk_bytes), one.leaked_blocks,
                one.overdue_blocks, one.opened, one.released,
            )
            for one in books
        ],
    )  # fmt: skip


def _tier(blocks: int, num_bytes: int) -> str:
    """What a tier below the pool holds."""
    return f"{blocks} ({num_bytes / 1e6:.1f} MB)" if blocks else "-"


def _print_return(instance_id: str, back: audit.KvReturn) -> None:
    if back.kind == "disk":
        _print_folder(instance_id, back)
        return
    what = f"{back.kind} {back.request_id} epoch {back.epoch}" if back.request_id else back.kind
    if back.kept_because:
        stdout.print(f"{instance_id}: kept {what}, {back.blocks} blocks: {back.kept_because}", markup=False)
        return
    verb = "gave back" if back.done else "would give back"
    stdout.print(f"{instance_id}: {verb} {what}, {back.blocks} blocks: {back.why}", markup=False)


def _print_folder(instance_id: str, back: audit.KvReturn) -> None:
    what = f"{back.path}, {back.bytes / 1e6:.1f} MB"
    if back.kept_because:
        stdout.print(f"{instance_id}: kept {what}: {back.kept_because}", markup=False)
        return
    verb = "removed" if back.done else "would remove"
    stdout.print(f"{instance_id}: {verb} {what}: {back.why}", markup=False)


def _print_unanswered(unanswered: Iterable[admin.Unanswered]) -> None:
    for one in unanswered:
        stdout.print(f"{one.instance_id} at {one.address}: NO ANSWER: {one.error.message}", markup=False)


def _exit(failed: bool) -> None:
    if failed:
        raise typer.Exit(1)
