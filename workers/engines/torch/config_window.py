"""Which layers of a dense decoder attend over a window, as the configurations in transformers say it."""

from __future__ import annotations

from workers.engines.torch.config_section import ConfigSection

_KINDS = {"sliding_attention": True, "full_attention": False}
_WITH_WINDOW = ("mistral", "ministral", "ministral3")  # a llama configuration may carry the key, but no llama decoder reads it


def read_window(section: ConfigSection, num_layers: int, model_type: str) -> tuple[int | None, tuple[bool, ...]]:
    """The window in tokens and the layers that have it; no layers named: all of them.

    `use_sliding_window: false` switches it off; `layer_types` names the layers. Raises ModelError for a window of 0
    tokens, for an unknown or missing layer type, and for window layers without a window.
    """
    window = section.optional_integer("sliding_window")
    if window == 0:
        raise section.error("sliding_window", "0 tokens: a row sees at least its own")
    if not section.flag("use_sliding_window", True):
        window = None
    if not section.has("layer_types"):
        return (window if model_type in _WITH_WINDOW else None), ()
    kinds = section.texts("layer_types")
    unknown = sorted(set(kinds) - set(_KINDS))
    if unknown:
        raise section.error("layer_types", f"{', '.join(unknown)}: not supported; {' and '.join(sorted(_KINDS))} are")
    if len(kinds) != num_layers:
        raise section.error("layer_types", f"{len(kinds)} entries for {num_layers} layers")
    layers = tuple(_KINDS[kind] for kind in kinds)
    if not any(layers):
        return None, ()
    if window is None:
        raise section.error("layer_types", "names layers with a window, but sliding_window gives none")
    return window, layers
