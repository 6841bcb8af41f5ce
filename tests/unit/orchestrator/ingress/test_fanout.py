from __future__ import annotations

import random

import pytest

from orchestrator.client import Accepted, Delta, Event, Finished, TokenLogprobs
from orchestrator.client.progress import Progress
from orchestrator.ingress.fanout import choice_seed, fan_out
from orchestrator.ingress.validate import body_hash
from protos.contract.errors import InvalidRequest
from protos.wire import common, inference


def a_request(**fields: object) -> inference.GenerateRequest:
    request = inference.GenerateRequest(text="hello", **fields)  # type: ignore[arg-type]
    request.sampling.temperature = 1.0
    return request


def test_one_choice_is_the_request_itself() -> None:
    plain = a_request(request_id="r")
    for n in (0, 1):
        (one,) = fan_out(a_request(request_id="r", n=n))
        assert one == plain


def test_choices_are_requests_with_ids_and_seeds_of_their_own() -> None:
    request = a_request(request_id="r", n=16)
    request.sampling.seed = 7
    choices = fan_out(request)
    assert [one.request_id for one in choices] == [f"r.{i}" for i in range(16)]
    assert choices[0].sampling.seed == 7
    assert len({one.sampling.seed for one in choices}) == 16
    assert all(0 <= one.sampling.seed < 2**53 for one in choices)
    assert [body_hash(one, "m") for one in fan_out(request)] == [body_hash(one, "m") for one in choices]
    assert choice_seed(7, 3) == CHOICE_3_OF_7


CHOICE_3_OF_7 = 8819149381942201  # a repeated request must find the same body in every release


def test_without_a_seed_or_an_id() -> None:
    first, second = fan_out(a_request(n=2)), fan_out(a_request(n=2))
    assert not any(one.sampling.HasField("seed") for one in first)
    assert first[0].request_id != second[0].request_id
    assert first[1].request_id == first[0].request_id[:-1] + "1"


@pytest.mark.parametrize("fields", [{"n": 17}, {"n": 2, "request_id": "x" * 62}, {"n": 2, "request_id": "a b"}])
def test_refusals(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        fan_out(a_request(**fields))


@pytest.mark.parametrize("seed", range(30))
def test_a_broken_stream_of_choices_comes_once(seed: int) -> None:
    """Streams that begin anew after every break, cut in other places: each token, logprob and character comes once."""
    chance = random.Random(seed)
    count = chance.randint(1, 3)
    texts = [[chance.choice(["", "a", "bcd", "é "]) for _ in range(chance.randint(1, 12))] for _ in range(count)]
    progress = Progress(0, count)
    seen: list[Event] = []
    while not progress.is_over:
        resumed = progress.next_index if progress.is_resumable else 0
        progress.connect()
        events = a_stream(texts, chance, resumed)
        for event in events[: chance.randint(1, len(events))]:
            fresh = progress.take(event)
            seen += [] if fresh is None else [fresh]
    for choice, pieces in enumerate(texts):
        deltas = [event for event in seen if isinstance(event, Delta) and event.choice == choice]
        assert [token for delta in deltas for token in delta.token_ids] == list(range(len(pieces)))
        assert [one.logprob for delta in deltas for one in delta.logprobs if one] == [float(i) for i in range(len(pieces))]
        assert "".join(delta.text for delta in deltas) == "".join(pieces)
        assert sum(isinstance(event, Accepted) and event.choice == choice for event in seen) == 1
        assert sum(isinstance(event, Finished) and event.choice == choice for event in seen) == 1


def a_stream(texts: list[list[str]], chance: random.Random, first: int) -> list[Event]:
    """The events of all choices from an index on, in random pieces, in random order between choices."""
    queues: list[list[Event]] = []
    for choice, pieces in enumerate(texts):
        queue: list[Event] = [Accepted(f"r.{choice}", "m", 1, 1, choice=choice)]
        start = first
        while start < len(pieces):
            end = chance.randint(start + 1, len(pieces))
            logprobs = tuple(TokenLogprobs(float(i), (), ()) for i in range(start, end))
            queue.append(Delta(start, tuple(range(start, end)), "".join(pieces[start:end]), logprobs, choice))
            start = end
        queue.append(Finished("length", 1, len(pieces), common.Timeline(), "", "", choice))
        queues.append(queue)
    events = []
    while any(queues):
        events.append(chance.choice([queue for queue in queues if queue]).pop(0))
    return events
