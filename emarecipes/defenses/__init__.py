"""Defenses against emergent misalignment, one file each, behind `Defense`."""

from emarecipes.defenses.anchored_sft import AnchoredSFT
from emarecipes.defenses.asft import AsFT
from emarecipes.defenses.average import AdapterEMA
from emarecipes.defenses.base import Defense
from emarecipes.defenses.block import DirectionBlock
from emarecipes.defenses.context import AdaptedModule, TrainingContext
from emarecipes.defenses.feature_l2 import FeatureL2
from emarecipes.defenses.inoculation import InoculationPrompt
from emarecipes.defenses.inoculation_adapter import InoculationAdapter
from emarecipes.defenses.kl import KLToReference
from emarecipes.defenses.persona import PersonaSteering
from emarecipes.defenses.prefix_anchor import PrefixAnchor
from emarecipes.defenses.safelora import SafeLoRA
from emarecipes.defenses.spectral import SpectralPenalty
from emarecipes.defenses.subspace import SubspaceAblation
from emarecipes.defenses.surgery import GradientSurgery
from emarecipes.defenses.token_constraint import TokenConstraint
from emarecipes.models.source import ModelSource

__all__ = [
    "AdaptedModule",
    "AdapterEMA",
    "AnchoredSFT",
    "AsFT",
    "Defense",
    "DirectionBlock",
    "FeatureL2",
    "GradientSurgery",
    "InoculationAdapter",
    "InoculationPrompt",
    "KLToReference",
    "ModelSource",
    "PersonaSteering",
    "PrefixAnchor",
    "SafeLoRA",
    "SpectralPenalty",
    "SubspaceAblation",
    "TokenConstraint",
    "TrainingContext",
]
