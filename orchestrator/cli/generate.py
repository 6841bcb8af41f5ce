"""`autan generate`: one prompt from the command line, streamed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict

from orchestrator.cli.connect import Cluster, Json, with_client
from orchestrator.cli.output import print_json
from orchestrator.client import Accepted, AsyncClient, Completion, Delta, Finished, TokenLogprobs
from protos.contract.errors import ConfigError
from protos.contract.grammar import MAX_GRAMMAR_BYTES

_MAX_FILE_BYTES = 16 * 1024 * 1024


def read_messages(path: Path) -> list[dict[str, str]]:
    """A JSON list of `{"role": ..., "content": ...}`. Raises ConfigError, naming the file and what is wrong."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_FILE_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON: {error}") from error
    if not isinstance(value, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in value
    ):
        raise ConfigError(f'{path}: expected a list of {{"role": "user", "content": "..."}}')
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def read_grammar(path: Path) -> str:
    """The text of a grammar; what it means is judged by the server. Raises ConfigError, naming the file."""
    try:
        if path.stat().st_size > MAX_GRAMMAR_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_GRAMMAR_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: no UTF-8 text: {error}") from error


def read_token_ids(text: str) -> list[int]:
    """`1,5,9` as ids. Raises ConfigError, naming the piece that is no number."""
    ids = []
    for piece in text.split(","):
        try:
            ids.append(int(piece))
        except ValueError:
            raise ConfigError(f"--token-ids: {piece!r} is no token id; expected something like 1,5,9") from None
    return ids


def read_logit_bias(text: str) -> dict[int, float]:
    """`5:-100,9:2.5` as ids and numbers. Raises ConfigError, naming the piece that is no such pair."""
    bias = {}
    for piece in text.split(","):
        token_id, _, value = piece.partition(":")
        try:
            bias[int(token_id)] = float(value)
        except ValueError:
            raise ConfigError(f"--logit-bias: {piece!r} is no pair; expected something like 5:-100,9:2.5") from None
    return bias


def generate(
    text: Annotated[str | None, typer.Argument(help="The prompt, as one user message; `-` reads it from stdin.")] = None,
    messages: Annotated[Path | None, typer.Option(help="JSON file with a list of role and content.")] = None,
    token_ids: Annotated[str | None, typer.Option(help="Token ids, 1,5,9: no template.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Encode the text as it is, without the chat template.")] = False,
    model: Annotated[str, typer.Option(help="Served name; default: the only one.")] = "",
    request_id: Annotated[str, typer.Option(help="Idempotency key; default: a new one.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="At most so many tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most probable tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens at least this share of the most probable one.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Over prompt and output; 1 is off.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Once for each token of the output.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="For each time a token is in the output.")] = None,
    logit_bias: Annotated[str | None, typer.Option(help="Token ids and what is added to their logits, 5:-100,9:2.5.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Log-probability of each token and of so many alternatives.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers to the one prompt.")] = 1,
    min_tokens: Annotated[int | None, typer.Option(help="No stop before so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    json_schema: Annotated[Path | None, typer.Option(help="File with a JSON schema that the answer follows.")] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the whole answer matches.")] = None,
    lark: Annotated[Path | None, typer.Option(help="File with a Lark grammar that the answer follows.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=86_400, help="Deadline of the request, seconds.")] = 600.0,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Generate from a prompt and stream the answer. With --json: ids, text, finish reason, request id, instances, timings."""
    options = _prompt(text, messages, token_ids, raw) | _grammar(json_schema, regex, lark)
    options |= {
        "model": model,
        "request_id": request_id,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": read_logit_bias(logit_bias) if logit_bias else None,
        "logprobs": logprobs,
        "n": n,
        "min_tokens": min_tokens,
        "seed": seed,
        "stop": stop or None,
        "ignore_eos": ignore_eos or None,
        "timeout_s": timeout,
    }
    if as_json:
        print_json(answers_json(with_client(lambda client: client.complete_all(**options), cluster, timeout)))
    elif n > 1 or logprobs is not None:
        _print_answers(with_client(lambda client: client.complete_all(**options), cluster, timeout))
    else:
        with_client(lambda client: _print_stream(client, options), cluster, timeout)


def _prompt(text: str | None, messages: Path | None, token_ids: str | None, raw: bool) -> dict[str, Any]:
    if sum(given is not None for given in (text, messages, token_ids)) != 1:
        raise ConfigError("generate: give exactly one of TEXT, --messages and --token-ids")
    if messages is not None:
        return {"messages": read_messages(messages)}
    if token_ids is not None:
        return {"token_ids": read_token_ids(token_ids)}
    prompt = sys.stdin.read() if text == "-" else text
    return {"text": prompt} if raw else {"messages": [{"role": "user", "content": prompt}]}


def _grammar(json_schema: Path | None, regex: str | None, lark: Path | None) -> dict[str, Any]:
    if sum(given is not None for given in (json_schema, regex, lark)) > 1:
        raise ConfigError("generate: give at most one of --json-schema, --regex and --lark")
    return {
        "json_schema": None if json_schema is None else read_grammar(json_schema),
        "regex": regex,
        "lark": None if lark is None else read_grammar(lark),
    }


def answers_json(answers: list[Completion]) -> dict[str, Any]:
    """One answer as it is; several under `choices`, with the usage of all: the prompt counts once."""
    if len(answers) == 1:
        return completion_json(answers[0])
    completed = sum(len(answer.token_ids) for answer in answers)
    return {
        "choices": [completion_json(answer) for answer in answers],
        "usage": {"prompt_tokens": answers[0].prompt_tokens, "completion_tokens": completed},
    }


def completion_json(done: Completion) -> dict[str, Any]:
    """A whole answer as `--json` prints it; times in seconds."""
    timeline = MessageToDict(done.timeline, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    timeline["handoff_bytes"] = int(done.timeline.handoff_bytes)
    answer: dict[str, Any] = {
        "request_id": done.request_id,
        "model": done.model,
        "token_ids": list(done.token_ids),
        "text": done.text,
        "finish_reason": done.finish_reason,
        "stop": done.stop or None,
        "seed": done.seed,
        "usage": {"prompt_tokens": done.prompt_tokens, "completion_tokens": len(done.token_ids)},
        "prefill_instance": done.timeline.prefill_instance,
        "decode_instance": done.timeline.decode_instance,
        "timeline": timeline,
    }
    if done.logprobs:
        answer["logprobs"] = [
            _logprobs_json(token_id, one) for token_id, one in zip(done.token_ids, done.logprobs, strict=True)
        ]
    return answer


def _logprobs_json(token_id: int, found: TokenLogprobs | None) -> dict[str, Any]:
    if found is None:
        return {"token_id": token_id, "logprob": None, "top": []}
    top = [{"token_id": i, "logprob": p} for i, p in zip(found.top_ids, found.top_logprobs, strict=True)]
    return {"token_id": token_id, "logprob": found.logprob, "top": top}


def _print_answers(answers: list[Completion]) -> None:
    """Each text, and below it a line for each token: id, logprob, alternatives."""
    for number, answer in enumerate(answers):
        if len(answers) > 1:
            sys.stdout.write(f"[{number}]\n")
        sys.stdout.write(answer.text + "\n")
        for token_id, found in zip(answer.token_ids, answer.logprobs, strict=False):
            top = () if found is None else zip(found.top_ids, found.top_logprobs, strict=True)
            shown = "" if found is None else f"{found.logprob:9.4f}"
            alternatives = " ".join(f"{i}:{p:.4f}" for i, p in top)
            sys.stdout.write(f"{token_id:>8} {shown:>9}  {alternatives}\n")


async def _print_stream(client: AsyncClient, options: dict[str, Any]) -> None:
    async for event in client.generate(**options):
        match event:
            case Delta() | Finished():
                sys.stdout.write(event.text)
                sys.stdout.flush()
            case Accepted():
                pass
    sys.stdout.write("\n")
