"""Whether vLLM can serve an adapter once it is written as an ordinary LoRA, and with which flags.

The rules are those of vLLM 0.33, from the files named beside them; most were tried with vLLM's own models and loader
(`tests/peft_adapters/test_vllm.py`). Two things happen to a tensor that vLLM has no layer for. If no layer of the
model has its last name, loading fails (`LoRAModel.from_local_checkpoint`, vllm/lora/lora_model.py). If one has, but
not at its path, it is dropped without a word (`LoRAModelManager.activate_adapter`, vllm/lora/model_manager.py): the
model then answers as if that part had not been trained. Both are refused here where the adapter's file tells.

Packed layers need nothing: vLLM puts `q_proj`, `k_proj`, `v_proj` together as `qkv_proj` itself
(`packed_modules_mapping` of each model), and takes `qkv_proj` where the checkpoint has it so (vllm/.../phi3.py).
Keys of the configuration that it does not know are ignored (`PEFTHelper.from_dict`, vllm/lora/peft_helper.py); it
refuses `use_bdlora`, and versions before that key ignored it. So only the form "lora" is for vLLM.
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
"""What `--max-lora-rank` can be: `MaxLoRARanks`, vllm/config/lora.py."""
_DEFAULT_RANK = 16

_WITHOUT_ADAPTERS = ("BloomForCausalLM", "FalconForCausalLM", "GPT2ForSequenceClassification", "GPT2LMHeadModel")
"""Models of vLLM's own that lack `SupportsLoRA` (vllm/model_executor/models), so that `--enable-lora` does not start
them, and whose linears vLLM does not find in transformers' code either (vllm/model_executor/models/transformers)."""
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
"""Models of vLLM's own that lack `SupportsLoRA`, and that it may run in transformers' code, which has it; GPT-J and
StableLM were tried."""


@dataclass(frozen=True)
class VllmNeeds:
    """What vLLM has to be started with to serve an adapter.

    Attributes:
        rank: of the LoRA that is written.
        max_lora_rank: the smallest value of `--max-lora-rank` that admits it.
        notes: what to know beforehand, one sentence or two each.
    """

    rank: int
    max_lora_rank: int
    notes: tuple[str, ...] = ()

    @property
    def flags(self) -> str:
        """For `vllm serve`."""
        rank = f" --max-lora-rank {self.max_lora_rank}" if self.max_lora_rank > _DEFAULT_RANK else ""
        return f"--enable-lora{rank}"

    def __str__(self) -> str:
        return "\n".join([f"vllm serve BASE {self.flags}", *self.notes])


def check_for_vllm(adapter: Adapter) -> VllmNeeds:
    """Checks an adapter that is about to be written as an ordinary LoRA; nothing is computed or written.

    Raises:
        MELoRAError: for what vLLM would refuse, or load and then leave out.
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
    """The rank of a site's LoRA: of its blocks and parts together, for one matrix."""
    own = adapter.tensors_of(site)
    return own.total_rank // own.num_experts


def _refuse_kept(adapter: Adapter) -> None:
    """vLLM reads A and B alone (`parse_fine_tuned_lora_name`, vllm/lora/utils.py).

    0.33 also takes one `classifier` or `score`, of some classification models (`PEFTHelper._validate_features`,
    vllm/lora/peft_helper.py); earlier versions refuse every `modules_to_save`.
    """
    if adapter.kept:
        _refuse(
            adapter,
            f"it holds what was trained whole ({_named(adapter.kept)}), which vLLM does not read from adapters (newer "
            "versions read a `classifier` or `score`, of some models)",
            "fold it into the base",
        )


def _refuse_model(adapter: Adapter) -> None:
    """`LoRAConfig.verify_with_model_config`, vllm/config/lora.py."""
    name = adapter.model.get("class")
    if name in _WITHOUT_ADAPTERS:
        _refuse(adapter, f"it is of a `{name}`, which vLLM serves without adapters", "fold it into the base")


def _refuse_sites(adapter: Adapter) -> None:
    """Sites that vLLM has no adaptable layer for."""
    stacks = [site for site in adapter.configs if is_stack(adapter, site)]
    if stacks:
        _refuse(
            adapter,
            f"it adapts stacks of experts ({_named(stacks)}), which vLLM takes of some models only, drops without a "
            "word for others (Mixtral, whose layers it names differently), and which have not been tried there",
            "fold it into the base",
        )
    lying = [site for site in adapter.configs if adapter.transposed.get(site)]
    if lying:
        _refuse(
            adapter,
            f"the weights of {_named(lying)} lie (in, out), as Conv1D's do, and vLLM adapts its own linear layers only",
            "fold it into the base",
        )
    poolers = [site for site in adapter.configs if site.endswith("pooler.dense")]
    if poolers:
        _refuse(
            adapter,
            f"it adapts {_named(poolers)}, which vLLM drops without a word: its pooler takes no adapters",
            "train without it, or fold the adapter into the base",
        )


def _notes(adapter: Adapter) -> tuple[str, ...]:
    """What vLLM may do, which depends on how it is started."""
    name = str(adapter.model.get("class") or "")
    notes = []
    if name in _WITH_TRANSFORMERS_CODE:
        notes.append(
            f"vLLM's own `{name}` takes no adapters, and `--enable-lora` does not start it. Given `--model-impl "
            "transformers` too, it runs in transformers' code, which takes them, as far as vLLM supports that model."
        )
    if any(last_name(site) == "lm_head" for site in adapter.configs):
        notes.append(
            "vLLM adapts `lm_head` of the models that name it in `embedding_modules` (such as Llama), and refuses the "
            "adapter for others (such as Qwen2)."
        )
    if name.endswith("Model") and not name.endswith("LMHeadModel"):
        notes.append(
            f"The adapter is of a `{name}`: vLLM applies it to an embedding model (`--runner pooling`). A model that "
            "generates text has other names for these layers, and would load the adapter and leave it out."
        )
    return tuple(notes)


def _named(names: Iterable[str]) -> str:
    return first_of([f"`{name}`" for name in names], 3)


def _refuse(adapter: Adapter, reason: str, remedy: str) -> NoReturn:
    raise MELoRAError(f"`{adapter.directory}` cannot be served by vLLM: {reason}; {remedy}")
