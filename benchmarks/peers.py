"""The methods that PEFT has too: our configuration as PEFT's, setting by setting.

To compare a new method, add one function here; everything else finds it through the registry.
"""

from collections.abc import Callable
from typing import Any

from peft import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HiraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)


def _lora(config: Any, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        use_rslora=config.scaling == "rslora",
        lora_dropout=config.dropout,
        **more,
    )


def _dora(config: Any) -> LoraConfig:
    return _lora(config, use_dora=True)


def _vera(config: Any) -> VeraConfig:
    return VeraConfig(
        r=config.rank,
        d_initial=config.d_initial,
        vera_dropout=config.dropout,
        projection_prng_key=config.seed,
    )


def _adalora(config: Any) -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=config.rank,
        target_r=int(config.target),
        lora_alpha=config.alpha,
        orth_reg_weight=config.orthogonality,
        total_step=1000,
    )


def _rand_lora(config: Any) -> RandLoraConfig:
    return RandLoraConfig(r=config.rank, randlora_alpha=config.scale * config.rank)


def _uni_lora(config: Any) -> UniLoraConfig:
    return UniLoraConfig(r=config.rank, theta_d_length=config.length or 256)


def _vb_lora(config: Any) -> VBLoRAConfig:
    return VBLoRAConfig(
        r=config.rank, num_vectors=config.bank, vector_length=config.block, topk=config.top_k
    )


def _loha(config: Any) -> LoHaConfig:
    return LoHaConfig(r=config.rank, alpha=config.scale * config.rank)


def _lokr(config: Any) -> LoKrConfig:
    return LoKrConfig(
        r=config.rank,
        alpha=config.rank if config.alpha is None else config.alpha,
        decompose_factor=-1 if config.factor is None else config.factor,
    )


def _tiny_lora(config: Any) -> TinyLoraConfig:
    return TinyLoraConfig(r=config.rank, u=config.coefficients, weight_tying=config.weight_tying)


def _fourier_ft(config: Any) -> FourierFTConfig:
    return FourierFTConfig(n_frequency=config.coefficients, scaling=config.scale)


def _oft(config: Any) -> OFTConfig:
    return OFTConfig(
        r=0,
        oft_block_size=config.block,
        block_share=config.share,
        use_cayley_neumann=config.cayley == "neumann",
    )


def _boft(config: Any) -> BOFTConfig:
    return BOFTConfig(boft_block_size=config.block, boft_n_butterfly_factor=config.depth)


PEERS: dict[str, Callable[[Any], Any]] = {
    "adalora": _adalora,
    "boft": _boft,
    "dora": _dora,
    "fourier-ft": _fourier_ft,
    "hira": lambda config: HiraConfig(r=config.rank),
    "loha": _loha,
    "lokr": _lokr,
    "lora": _lora,
    "miss": lambda config: MissConfig(r=config.rank),
    "oft": _oft,
    "rand-lora": _rand_lora,
    "tiny-lora": _tiny_lora,
    "uni-lora": _uni_lora,
    "vb-lora": _vb_lora,
    "vera": _vera,
}
"""By registered name. LoRA-FA is missing because PEFT has it as an optimiser, not as a layer."""
