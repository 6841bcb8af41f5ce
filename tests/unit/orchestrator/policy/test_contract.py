"""Which instances are set apart."""

from __future__ import annotations

import random

from orchestrator.ingress.admin_service import mark_apart
from orchestrator.policy.contract import Member, set_apart
from protos.wire import admin, common


def member(name: str, fingerprint: str = "f", model: str = "m", decodes: bool = True) -> Member:
    return Member(instance_id=name, model=model, fingerprint=fingerprint, decodes=decodes)


def test_equal_instances_and_other_models_stay_together() -> None:
    assert set_apart([member("a"), member("b"), member("c", "g", model="n")]) == {}
    assert set_apart([]) == {}


def test_the_few_are_set_apart_from_the_many() -> None:
    assert set_apart([member("a", "old"), member("b", "new"), member("c", "new")]) == {"a": "b"}


def test_those_that_cannot_decode_do_not_decide() -> None:
    members = [member("p-0", "x", decodes=False), member("p-1", "x", decodes=False), member("d-0", "y")]
    assert set_apart(members) == {"p-0": "d-0", "p-1": "d-0"}


def test_the_answer_does_not_depend_on_the_order() -> None:
    rng = random.Random(1)
    for _ in range(200):
        members = [member(f"i-{n}", rng.choice("xyz"), rng.choice("mn"), rng.random() < 0.5) for n in range(rng.randrange(9))]
        apart = set_apart(members)
        assert set_apart(rng.sample(members, len(members))) == apart
        kept = {(one.model, one.fingerprint) for one in members if one.instance_id not in apart}
        assert len(kept) == len({one.model for one in members}), "one fingerprint for each model"


def test_status_names_the_fields_in_which_an_instance_differs() -> None:
    def instance(name: str, template: str, state: common.InstanceState) -> admin.InstanceStatus:
        fingerprint = common.Fingerprint(model="m", template_digest=template)
        card = common.InstanceCard(fingerprint=fingerprint)
        return admin.InstanceStatus(instance_id=name, role=common.ROLE_COMBINED, state=state, card=card)

    ready, lost = common.INSTANCE_STATE_READY, common.INSTANCE_STATE_LOST
    shown = [instance("a", "1", ready), instance("b", "1", ready), instance("c", "2", ready), instance("d", "3", lost)]
    mark_apart(shown)
    assert [one.apart_from for one in shown] == ["", "", "a", ""]
    assert list(shown[2].differing) == ["template_digest: '1' != '2'"]
