"""Grammars through a whole cluster: door, store, prefill, hand-off, decode, client."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from tests.support.command import Autan, cluster_values
from tests.support.grammars import PHONE, SCHEMA, SUM, SUM_AS_REGEX
from workers.engines.torch.tiny import write_tiny

pytestmark = pytest.mark.timeout(120)


def test_a_cluster_answers_within_the_grammar_and_refuses_bad_ones(autan: Autan, tmp_path: Path) -> None:
    dims = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = write_tiny("llama", tmp_path / "model", 21, **dims)
    engine = {"kind": "torch", "num_blocks": 96, "block_tokens": 16, "max_batch_tokens": 64, "threads": 1}
    values = cluster_values("bound", model={"name": "tiny", "source": str(folder), "dtype": "float32"})
    values["pools"] = [{"name": role, "role": role, "instances": 1, "engine": dict(engine)} for role in ("prefill", "decode")]
    autan.json("up", autan.file("bound", values), "--detach")
    schema, lark, broken = tmp_path / "schema.json", tmp_path / "sum.lark", tmp_path / "broken.lark"
    schema.write_text(json.dumps(SCHEMA))
    lark.write_text(SUM)
    broken.write_text("start: foo\n")
    ask = ["generate", "--token-ids", ",".join(map(str, range(20, 80))), "--temperature", "1", "--seed", "3"]

    person = autan.json(*ask, "--max-tokens", "400", "--json-schema", str(schema))
    assert person["finish_reason"] == "stop" and person["timeline"]["handoff_blocks"] > 0
    jsonschema.validate(json.loads(person["text"]), SCHEMA)
    phone = autan.json(*ask, "--regex", PHONE)
    assert phone["finish_reason"] == "stop" and re.fullmatch(PHONE, phone["text"])
    assert (phone["prefill_instance"], phone["decode_instance"]) == ("prefill-0", "decode-0")
    assert re.fullmatch(SUM_AS_REGEX, autan(*ask, "--lark", str(lark)).stdout.strip())

    refused = autan(*ask, "--lark", str(broken))
    assert refused.returncode == 2 and "sampling.grammar.lark" in refused.stderr and "foo" in refused.stderr
    endless = autan(*ask, "--regex", "a", "--ignore-eos")
    assert endless.returncode == 2 and "ignore_eos" in endless.stderr
    late = autan(*ask, "--max-tokens", "40", "--lark", str(_late(tmp_path)))
    assert late.returncode == 2 and "items" in late.stderr, "the grammar is to blame, not the cluster"
    missing = autan(*ask, "--json-schema", str(tmp_path / "none.json"))
    assert missing.returncode == 2 and "none.json" in missing.stderr
    two = autan(*ask, "--regex", "a", "--lark", str(lark))
    assert two.returncode == 2 and "at most one" in two.stderr
    assert {one["kv_blocks"]["used"] for one in autan.json("status")["instances"]} == {0}


def _late(folder: Path) -> Path:
    """A grammar that compiles, has a first token, and reaches a limit with the second."""
    path = folder / "late.lark"
    path.write_text("start: " + " | ".join(f'"k{i}" start' for i in range(3000)) + "\n")
    return path
