"""Two parameters at two levels: seconds, to see that a search works."""

from tune_spaces.space import Parameter, Space

SPACE = Space(
    name="smoke",
    description="Two parameters at two levels, to see that everything works.",
    parameters=(
        Parameter(key="pruning.interval", label="ΔT", low=0.05, high=0.2, log=True, unit="steps", levels=2),
        Parameter(key="optimizer.lr", label="learning rate", low=0.25, high=1, log=True, unit="lr", levels=2),
    ),
)
