"""Pruning, penalty, hypernetwork size and learning rates together."""

from tune_spaces.space import Parameter, Space

SPACE = Space(
    name="joint",
    description="ΔT, k, γ, hypernetwork size and learning rates together.",
    parameters=(
        Parameter(key="pruning.interval", label="ΔT", low=0.01, high=0.1, log=True, unit="steps"),
        Parameter(key="pruning.count", label="k", low=0.02, high=1, log=True, unit="excess"),
        Parameter(key="gamma", label="γ", low=1e-3, high=1, log=True, default=0.1),
        Parameter(key="hypernetwork.hidden_size", label="hidden size", choices=(24, 48, 96, 192, 312)),
        Parameter(key="optimizer.lr", label="learning rate", low=0.125, high=8, log=True, unit="lr"),
        Parameter(key="optimizer.trunk_lr", label="trunks' rate", low=0.05, high=20, log=True, unit="trunk_lr"),
    ),
)
