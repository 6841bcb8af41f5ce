"""Which instance this process is, in which incarnation and state. Shared by everything that speaks for the instance."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.kv_transfer.lifecycle import Lifecycle
from workers.service.lifecycle import InstanceState, instance_lifecycle


@dataclass(slots=True, kw_only=True, eq=False)
class Membership:
    """`incarnation` is none while the instance is not registered."""

    instance_id: str
    incarnation: int | None = None
    lifecycle: Lifecycle[InstanceState] = field(default_factory=instance_lifecycle)

    @property
    def number(self) -> int:
        """The incarnation for messages; zero, which nobody ever is, while there is none."""
        return self.incarnation or 0

    @property
    def state(self) -> InstanceState:
        """Where the instance is."""
        return self.lifecycle.state
