"""From the manifest's optimizer (class and groups) to the update rule of each group, or a refusal by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmc_dist.errors import LmcError
from lmc_dist.update_rules.rules import SGD, Adam, Rule

_TORCH_ADAM = ("Adam", "AdamW")
# DeepSpeed's own Adams, and what the constructor of each calls the choice of weight decay.
DEEPSPEED_ADAM = {"FusedAdam": "adam_w_mode", "DeepSpeedCPUAdam": "adamw_mode"}
KNOWN = ("SGD", *_TORCH_ADAM, *DEEPSPEED_ADAM)


def group_rules(optimizer: Mapping[str, Any]) -> list[Rule]:
    """The rule of each parameter group. Local.

    Args:
        optimizer: Of the manifest: `class`, `groups`, and for DeepSpeed's Adam `adam_w_mode` (in either place).

    Raises:
        LmcError: A class or a setting whose update rule is not known.
    """
    return [_group_rule(str(optimizer.get("class")), optimizer, group) for group in optimizer["groups"]]


def check_supported(optimizer: Mapping[str, Any]) -> None:
    """Raises LmcError where `group_rules` would. Local."""
    group_rules(optimizer)


def _group_rule(name: str, optimizer: Mapping[str, Any], group: Mapping[str, Any]) -> Rule:
    if name == "SGD":
        return SGD(
            momentum=float(group.get("momentum") or 0.0),
            dampening=float(group.get("dampening") or 0.0),
            weight_decay=float(group.get("weight_decay") or 0.0),
            nesterov=bool(group.get("nesterov")),
            maximize=bool(group.get("maximize")),
        )
    if name not in KNOWN:
        raise LmcError(
            f"the log was trained with {name}; corrections know the update rules of {', '.join(KNOWN)}: use "
            "replay_head=all, which steps the optimizer itself"
        )
    if "correct_bias" in group:
        raise LmcError(
            f"the log was trained with an {name} that has 'correct_bias', transformers' own and not torch's, which adds eps "
            "elsewhere: use replay_head=all"
        )
    is_torch = name in _TORCH_ADAM
    beta1, beta2 = group.get("betas", (0.9, 0.999))
    weight_decay = float(group.get("weight_decay") or 0.0)
    if is_torch:
        is_decoupled = name == "AdamW" or bool(group.get("decoupled_weight_decay"))
    else:
        mode = group.get("adam_w_mode", optimizer.get("adam_w_mode"))
        if mode is None and weight_decay:
            raise LmcError(
                f"the log was trained with {name} and weight_decay={weight_decay}, and does not say in which way it decays "
                "(adam_w_mode): add optimizer.adam_w_mode to its manifest, or use replay_head=all"
            )
        is_decoupled = bool(mode)
    return Adam(
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group.get("eps", 1e-8)),
        weight_decay=weight_decay,
        is_decoupled=is_decoupled,
        amsgrad=is_torch and bool(group.get("amsgrad")),
        maximize=is_torch and bool(group.get("maximize")),
        bias_correction=bool(group.get("bias_correction", True)),
    )
