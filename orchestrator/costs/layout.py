"""How a model lies on the GPUs of one instance."""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema.model_description import KvFormat, WeightFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`tensor` GPUs share each layer of one batch, `data` such groups batch their attention apart.

    The experts lie on all `gpus` = tensor x data: on `expert` groups whole, within a group split by width.
    """

    tensor: int = 1
    data: int = 1
    expert: int = 1
    weights: WeightFormat = "bf16"
    kv: KvFormat = "bf16"

    def __post_init__(self) -> None:
        assert min(self.tensor, self.data, self.expert) >= 1, f"{self}: sizes start at 1"
        assert self.gpus % self.expert == 0, f"{self}: expert groups must divide the {self.gpus} GPUs"

    @property
    def gpus(self) -> int:
        """GPUs of the instance."""
        return self.tensor * self.data

    @property
    def expert_tensor(self) -> int:
        """GPUs that share one expert."""
        return self.gpus // self.expert
