"""mlx_lm's names of transformers' modules, for the models that were run in both.

Our adapters contain Hugging Face's names. Adapters of an architecture that is missing here are refused: a module of the
same name may compute something else, such as a packed projection in another order.
"""

import re
from dataclasses import dataclass

EXPERTS = re.compile(r"(?P<block>.+)\.experts\.(?P<stack>gate_up_proj|down_proj)")
"""A stack of experts in transformers; mlx_lm has `switch_mlp` for `experts`, and two stacks for `gate_up_proj`."""


@dataclass(frozen=True)
class Architecture:
    """The names of one class of models.

    Attributes:
        renamed: a piece of transformers' names, and mlx_lm's replacement for it.
        head: mlx_lm's name of the head; None if its model uses the embedding's weight instead of a module.
        experts: whether the models have stacks of experts.
    """

    renamed: tuple[str, str] = ("", "")
    head: str | None = "lm_head"
    experts: bool = False

    def name_of(self, site: str) -> str | None:
        """Returns mlx_lm's name of a module, or None if its model has no such module."""
        if "." not in site:
            return self.head if site in ("lm_head", "embed_out") else None
        name = site.replace(*self.renamed, 1)
        return name if name.startswith("model.") else None


_SAME = Architecture()
_TIED = Architecture(head=None)
_EXPERTS = Architecture(experts=True)

ARCHITECTURES = {
    "Cohere2ForCausalLM": _TIED,
    "CohereForCausalLM": _TIED,
    "Ernie4_5ForCausalLM": _SAME,
    "GPT2LMHeadModel": Architecture(("transformer.", "model."), head=None),
    "GPTJForCausalLM": Architecture(("transformer.", "model.")),
    "GPTNeoXForCausalLM": Architecture(("gpt_neox.layers.", "model.h."), head="model.embed_out"),
    "Gemma2ForCausalLM": _TIED,
    "Gemma3ForCausalLM": _SAME,
    "GemmaForCausalLM": _TIED,
    "Glm4ForCausalLM": _SAME,
    "GraniteForCausalLM": _SAME,
    "HeliumForCausalLM": _SAME,
    "LlamaForCausalLM": _SAME,
    "MistralForCausalLM": _SAME,
    "MixtralForCausalLM": Architecture((".mlp.", ".block_sparse_moe."), experts=True),
    "NemotronForCausalLM": _SAME,
    "Olmo2ForCausalLM": _SAME,
    "OlmoeForCausalLM": _EXPERTS,
    "Phi3ForCausalLM": _SAME,
    "PhiForCausalLM": _SAME,
    "Qwen2ForCausalLM": _SAME,
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3ForCausalLM": _SAME,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "SeedOssForCausalLM": _SAME,
    "SmolLM3ForCausalLM": _SAME,
    "Starcoder2ForCausalLM": _SAME,
}
"""Class in transformers → its names. A missing class may have equal names: run it in both before you add it."""
