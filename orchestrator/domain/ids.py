"""Identity values. NewTypes, so that an instance id cannot stand where a request id is meant."""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", str)
InstanceId = NewType("InstanceId", str)
IngressId = NewType("IngressId", str)

# Grows with every assignment of a request; a message with a smaller one is refused by the resource.
Epoch = NewType("Epoch", int)

# Grows with every registration of an instance, never reused; one value for a whole group of ranks.
Incarnation = NewType("Incarnation", int)

# Grows whenever another candidate takes the leadership.
LeaderEpoch = NewType("LeaderEpoch", int)
