"""Recognises transformers' layers of experts, and names the remedies that let them be captured."""

from torch import nn

from melora_fx.torch_private import experts_implementation, is_experts_layer

REMEDY = 'a loop over experts depends on data: first call `model.set_experts_implementation("grouped_mm")`'
"""The remedy for a model whose experts prevent a whole capture."""


IN_PLACE_REMEDY = (
    'its experts are called one by one: first call `model.set_experts_implementation("grouped_mm")` or `("batched_mm")`'
)
"""The remedy for experts that cannot be adapted in their present form."""


NO_FORWARD_MODE = (
    "experts in the grouped form have no forward-mode derivatives: call "
    '`model.set_experts_implementation("batched_mm")` before `rewrite`'
)


def loops_over_experts(model: nn.Module) -> bool:
    """Returns whether `model` has layers of experts and is set to call them one by one."""
    configs = [config for module in model.modules() if (config := getattr(module, "config", None))]
    is_eager = any(experts_implementation(config) == "eager" for config in configs)
    return is_eager and any(is_experts_layer(module) for module in model.modules())
