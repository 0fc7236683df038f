"""Checks whether vLLM can serve an adapter that is written as an ordinary LoRA, and with which flags.

The rules are those of vLLM 0.33, from the files named next to them; most were tested with vLLM's own models and loader
(`tests/peft_adapters/test_vllm.py`). A tensor for which vLLM has no layer has one of two effects. If no layer of the
model has its last name, loading fails (`LoRAModel.from_local_checkpoint`, vllm/lora/lora_model.py). If a layer has this
name, but another path, the tensor is silently dropped (`LoRAModelManager.activate_adapter`,
vllm/lora/model_manager.py): the model then answers as if that part had not been trained. Both cases are refused here if
the adapter's file shows them.

Packed layers need no special treatment: vLLM packs `q_proj`, `k_proj`, `v_proj` into `qkv_proj` itself
(`packed_modules_mapping` of each model), and accepts `qkv_proj` if the checkpoint has it (vllm/.../phi3.py).
vLLM ignores unknown keys of the configuration (`PEFTHelper.from_dict`, vllm/lora/peft_helper.py). It refuses
`use_bdlora`, and versions that did not know this key ignored it. So only the form "lora" works with vLLM.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

from melora_fx.errors import MELoRAError
from melora_fx.names import first_of
from melora_fx.saving.adapter import Adapter

from .names import last_name
from .stacks import is_stack

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `--max-lora-rank` accepts: `MaxLoRARanks`, vllm/config/lora.py."""
_DEFAULT_RANK = 16

_WITHOUT_ADAPTERS = ("BloomForCausalLM", "FalconForCausalLM", "GPT2ForSequenceClassification", "GPT2LMHeadModel")
"""vLLM's own models that lack `SupportsLoRA` (vllm/model_executor/models) and so do not start with `--enable-lora`;
vLLM does not find their linears in transformers' code either (vllm/model_executor/models/transformers)."""
_WITH_TRANSFORMERS_CODE = (
    "BertForMaskedLM",
    "DbrxForCausalLM",
    "FalconMambaForCausalLM",
    "GPTJForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "RobertaForTokenClassification",
    "StableLmForCausalLM",
    "XLMRobertaForTokenClassification",
    "Zamba2ForCausalLM",
)
"""vLLM's own models that lack `SupportsLoRA`, but that vLLM may run in transformers' code, which has it; GPT-J and
StableLM were tested."""


@dataclass(frozen=True)
class VllmNeeds:
    """The options with which vLLM must be started to serve an adapter.

    Attributes:
        rank: the rank of the LoRA that is written.
        max_lora_rank: the smallest value of `--max-lora-rank` that admits it.
        notes: facts to know beforehand, one or two sentences each.
    """

    rank: int
    max_lora_rank: int
    notes: tuple[str, ...] = ()

    @property
    def flags(self) -> str:
        """The flags for `vllm serve`."""
        rank = f" --max-lora-rank {self.max_lora_rank}" if self.max_lora_rank > _DEFAULT_RANK else ""
        return f"--enable-lora{rank}"

    def __str__(self) -> str:
        return "\n".join([f"vllm serve BASE {self.flags}", *self.notes])


def check_for_vllm(adapter: Adapter) -> VllmNeeds:
    """Checks whether vLLM can serve an adapter as an ordinary LoRA; computes and writes nothing.

    Raises:
        MELoRAError: if vLLM would refuse a part of the adapter, or load the adapter without that part.
    """
    _refuse_kept(adapter)
    _refuse_model(adapter)
    _refuse_sites(adapter)
    rank = max(_rank_of(adapter, site) for site in adapter.configs)
    fitting = [value for value in RANKS if value >= rank]
    if not fitting:
        _refuse(
            adapter,
            f"as a LoRA it has rank {rank}, and vLLM's `--max-lora-rank` ends at {RANKS[-1]}",
            f"compress it to rank {RANKS[-1]} at most, or fold it into the base",
        )
    return VllmNeeds(rank, fitting[0], _notes(adapter))


def _rank_of(adapter: Adapter, site: str) -> int:
    """Returns the rank of a site's LoRA for one matrix: the sum over its blocks and parts."""
    own = adapter.tensors_of(site)
    return own.total_rank // own.num_experts


def _refuse_kept(adapter: Adapter) -> None:
    """Raises MELoRAError for trained modules.

    vLLM reads only A and B (`parse_fine_tuned_lora_name`, vllm/lora/utils.py). Version 0.33 also accepts one
    `classifier` or `score` of some classification models (`PEFTHelper._validate_features`, vllm/lora/peft_helper.py);
    earlier versions refuse every `modules_to_save`.
    """
    if adapter.kept:
        _refuse(
            adapter,
            f"it has modules that were trained in full ({_named(adapter.kept)}), which vLLM does not read from "
            "adapters (newer versions read a `classifier` or `score` of some models)",
            "fold it into the base",
        )


def _refuse_model(adapter: Adapter) -> None:
    """Raises MELoRAError for models without adapters (`LoRAConfig.verify_with_model_config`, vllm/config/lora.py)."""
    name = adapter.model.get("class")
    if name in _WITHOUT_ADAPTERS:
        _refuse(adapter, f"it adapts a `{name}`, which vLLM serves without adapters", "fold it into the base")


def _refuse_sites(adapter: Adapter) -> None:
    """Raises MELoRAError for sites for which vLLM has no adaptable layer."""
    stacks = [site for site in adapter.configs if is_stack(adapter, site)]
    if stacks:
        _refuse(
            adapter,
            f"it adapts stacks of experts ({_named(stacks)}), which vLLM accepts only for some models and silently "
            "drops for others (Mixtral, whose layers it names differently), and which have not been tested there",
            "fold it into the base",
        )
    lying = [site for site in adapter.configs if adapter.transposed.get(site)]
    if lying:
        _refuse(
            adapter,
            f"the weights of {_named(lying)} are (in, out), like Conv1D's, and vLLM adapts only its own linear layers",
            "fold it into the base",
        )
    poolers = [site for site in adapter.configs if site.endswith("pooler.dense")]
    if poolers:
        _refuse(
            adapter,
            f"it adapts {_named(poolers)}, which vLLM silently drops: its pooler accepts no adapters",
            "train without it, or fold the adapter into the base",
        )


def _notes(adapter: Adapter) -> tuple[str, ...]:
    """Returns notes on behaviour that depends on how vLLM is started."""
    name = str(adapter.model.get("class") or "")
    notes = []
    if name in _WITH_TRANSFORMERS_CODE:
        notes.append(
            f"vLLM's own `{name}` accepts no adapters and does not start with `--enable-lora`. Add `--model-impl "
            "transformers` to run it in transformers' code, which accepts adapters if vLLM supports the model there."
        )
    if any(last_name(site) == "lm_head" for site in adapter.configs):
        notes.append(
            "vLLM adapts `lm_head` only in models that name it in `embedding_modules` (such as Llama), and refuses the "
            "adapter for other models (such as Qwen2)."
        )
    if name.endswith("Model") and not name.endswith("LMHeadModel"):
        notes.append(
            f"The adapter is of a `{name}`: vLLM applies it to an embedding model (`--runner pooling`). A model that "
            "generates text has other names for these layers: it would load the adapter and ignore it."
        )
    return tuple(notes)


def _named(names: Iterable[str]) -> str:
    return first_of([f"`{name}`" for name in names], 3)


def _refuse(adapter: Adapter, reason: str, remedy: str) -> NoReturn:
    raise MELoRAError(f"`{adapter.directory}` cannot be served by vLLM: {reason}; {remedy}")
