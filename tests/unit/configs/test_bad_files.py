"""Every mistake in a cluster file is named with its line and key path."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.load import load_bytes, load_cluster
from configs.yaml_tree import MAX_BYTES
from protos.contract.errors import ConfigError

GOOD = """\
version: 1
name: c
model: {name: m, source: demo}
pools:
  - name: p
    role: prefill
    engine:
      kind: torch
      num_blocks: 8
  - name: d
    role: decode
    engine:
      kind: torch
      num_blocks: 8
"""


def complaint(text: str | bytes) -> str:
    """What the loader says of a file called F."""
    with pytest.raises(ConfigError) as caught:
        load_bytes(text.encode() if isinstance(text, str) else text, "F")
    return str(caught.value)


def test_the_file_that_the_table_changes_is_good() -> None:
    assert load_bytes(GOOD.encode(), "F").pools[1].engine.num_blocks == 8


REPLACED = [
    ("num_blocks: 8", "num_blokcs: 8", "F:9: pools[0].engine.num_blokcs: unknown key (did you mean num_blocks?)"),
    ("name: c", "nmae: c", "F:2: nmae: unknown key (did you mean name?)\nF:1: name: missing"),
    ("name: c", "name: on", None),
    ("name: c", "name: 12", "F:2: name: must be text (quote it), got 12"),
    ("name: c", 'name: "a b"', "F:2: name: must match pattern '^[A-Za-z0-9_.-]{1,64}$', got 'a b'"),
    ("num_blocks: 8", "num_blocks: 8.0", "F:9: pools[0].engine.num_blocks: must be an integer, got 8.0"),
    ("num_blocks: 8", 'num_blocks: "8"', "F:9: pools[0].engine.num_blocks: must be an integer, got '8'"),
    ("num_blocks: 8", "num_blocks: true", "F:9: pools[0].engine.num_blocks: must be an integer, got True"),
    ("num_blocks: 8", "num_blocks: -1", "F:9: pools[0].engine.num_blocks: must be greater than or equal to 2, got -1"),
    ("num_blocks: 8", "num_blocks: .nan", "F:9: pools[0].engine.num_blocks: .nan is not a finite number"),
    ("num_blocks: 8", "num_blocks: 1e999", "F:9: pools[0].engine.num_blocks: 1e999 is not a finite number"),
    (
        "num_blocks: 8",
        f"num_blocks: {'9' * 5000}",
        "F:9: pools[0].engine.num_blocks: an integer of 5000 digits is out of every range",
    ),
    (
        "role: decode",
        "role: decoder",
        "F:11: pools[1].role: must be 'prefill', 'decode' or 'combined', got 'decoder'",
    ),
    ("role: decode", "role: prefill", "F:4: pools: need a prefill and a decode pool, or a combined one; there is only prefill"),
    ("name: d", "name: p", "F:10: pools[1].name: 'p' is the name of pools[0] already"),
    (
        "source: demo",
        "source: oracle",
        "F:8: pools[0].engine.kind: 'torch' does not go with model.source 'oracle': the oracle engine serves the oracle alone\n"
        "F:13: pools[1].engine.kind: 'torch' does not go with model.source 'oracle': the oracle engine serves the oracle alone",
    ),
    (
        "      num_blocks: 8\n  - name: d",
        "      num_blocks: 8\n      block_tokens: 16\n  - name: d",
        "F:13: pools[1].engine.block_tokens: 64 differs from the 16 of pools[0]: blocks could not be handed over",
    ),
    (
        "role: decode",
        "role: !!python/object/apply:os.system [ls]",
        "F:11: pools[1].role: tag !!python/object/apply:os.system is not allowed; only plain values are",
    ),
    (
        "role: decode",
        "role: !!python/name:os.system ''",
        "F:11: pools[1].role: tag !!python/name:os.system is not allowed; only plain values are",
    ),
    ("role: decode", "role: !role decode", "F:11: pools[1].role: tag !role is not allowed; only plain values are"),
    ("num_blocks: 8", "num_blocks: !!int eight", "F:9: pools[0].engine.num_blocks: 'eight' is no int"),
    (
        "source: demo}",
        "source: demo, source: x}",
        "F:3: model.source: the key is there already, on line 3",
    ),
    ("name: d", "name: d\n    <<: {role: decode}", "F:11: pools[1]: '<<' is not allowed as a key; keys are plain text"),
    ("name: c", "name: c\n3: 4", "F:3: '3' is not allowed as a key; keys are plain text"),
    ("name: c", "name: c\n[a, b]: 4", "F:3: a list or mapping is not allowed as a key; keys are plain text"),
    ("source: demo}", "source: demo}\nstore: 3", "F:4: store: must be a mapping of keys to values, got 3"),
    ("source: demo}", "source: demo}\nstore: {url: http://x}", "F:4: store.url: must match pattern"),
    (
        "source: demo}",
        "source: demo}\ntiming:\n  lease_s: 1",
        "F:5: timing.lease_s: 1.0 is below three times heartbeat_s (0.5): one late renewal would end the lease",
    ),
    (
        "source: demo}",
        "source: demo}\nlauncher:\n  kind: subprocess\n  address: auto",
        "F:6: launcher.address: is for launcher.kind: ray; subprocess starts everything on this machine",
    ),
    (
        "source: demo}",
        "source: demo}\ningress: {address: localhost}",
        "F:4: ingress.address: 'localhost' is neither host:port nor unix:///absolute/path",
    ),
    (
        "source: demo}",
        "source: demo}\ningress: {address: '0.0.0.0:1'}",
        "F:4: ingress.address: '0.0.0.0:1' can be reached from other machines",
    ),
]


@pytest.mark.parametrize(("old", "new", "said"), REPLACED, ids=[new.strip()[:40] for _, new, _ in REPLACED])
def test_one_wrong_line(old: str, new: str, said: str | None) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    if said is None:
        load_bytes(text.encode(), "F")
        return
    told = complaint(text)
    assert all(any(line.startswith(expected) for line in told.splitlines()) for expected in said.splitlines()), told
    assert len(told.splitlines()) == len(said.splitlines()), told


WHOLE = [
    ("", "F:1: the file is empty; a cluster file is a mapping of keys to values"),
    ("# nothing\n", "F:1: the file is empty; a cluster file is a mapping of keys to values"),
    ("- a\n- b\n", "F:1: the top level must be a mapping of keys to values"),
    ("\n\njust text\n", "F:3: the top level must be a mapping of keys to values"),
    ("a: 1\nb:\n\tc: 2\n", "F:3: a tab in the indentation; YAML indents with spaces"),
    ("a: 1\n  \tb: 2\n", "F:2: a tab in the indentation; YAML indents with spaces"),
    ("a: &x [1]\nb: *x\n", "F:1: anchors and aliases (&name, *name) are not allowed; write the value out"),
    ("a: 1\nb: *nowhere\n", "F:2: anchors and aliases (&name, *name) are not allowed; write the value out"),
    ("a: 1\n---\nb: 2\n", "F:2: no valid YAML: but found another document, expected a single document in the stream"),
    ("a: [1, 2\nb: 3\n", "F:2: no valid YAML: "),
    ("a: 'x\n", "F:2: no valid YAML: found unexpected end of stream"),
    ("a: 1\nb: \0\n", "F:2: character "),
    (b"a: 1\nb: \xff\xfe\n", "F:2: byte 8 is no UTF-8 text"),
    ("a: " + "[" * 100_000, "F:1: nested deeper than 32 levels"),
    ("a: " + "{b: " * 40 + "1" + "}" * 40, "F:1: nested deeper than 32 levels"),
    ("#" * (MAX_BYTES + 1), f"F:1: larger than {MAX_BYTES} bytes; this is no cluster file"),
]


@pytest.mark.parametrize(("text", "said"), WHOLE, ids=[said[:40] for _, said in WHOLE])
def test_what_is_no_cluster_file_at_all(text: str | bytes, said: str) -> None:
    told = complaint(text)
    assert told.startswith(said)
    assert "\n" not in told


def test_a_bomb_of_aliases_costs_nothing() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert "anchors and aliases" in complaint("l0: &l0 [x]\n" + "\n".join(levels))


def test_all_mistakes_come_in_one_message_in_the_order_of_the_file() -> None:
    text = (
        GOOD.replace("name: c", "name: 7").replace("num_blocks: 8", "num_blocks: lots").replace("role: decode", "roll: decode")
    )
    assert complaint(text).splitlines() == [
        "F:2: name: must be text (quote it), got 7",
        "F:9: pools[0].engine.num_blocks: must be an integer, got 'lots'",
        "F:10: pools[1].role: missing",
        "F:11: pools[1].roll: unknown key (did you mean role?)",
        "F:14: pools[1].engine.num_blocks: must be an integer, got 'lots'",
    ]


def test_an_unknown_key_without_a_near_name_lists_the_known_ones() -> None:
    told = complaint(GOOD + "launcher:\n  zzz: 1\n")
    assert told == "F:16: launcher.zzz: unknown key (known: kind, address, num_cpus, object_store_mb, start_timeout_s)"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lptop: no such file and no such preset \(did you mean laptop\?\)"):
        load_cluster("lptop")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_cluster(tmp_path)
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (3 * MAX_BYTES))
    with pytest.raises(ConfigError, match=r"big\.yaml:1: larger than"):
        load_cluster(big)
