"""When the rank falls: interval, count, window, schedule and score."""

from tune_spaces.space import Parameter, Space

SPACE = Space(
    name="pruning",
    description="When singular values are pruned, how many at a time, and by which score.",
    parameters=(
        Parameter(key="pruning.schedule", label="schedule", choices=("interval", "cubic")),
        Parameter(
            key="pruning.interval", label="ΔT", low=0.01, high=0.1, log=True, unit="steps", levels=(0.01, 0.03, 0.1)
        ),
        # 0.05 of what has to go needs 20 events, so that small counts go with short intervals only.
        Parameter(
            key="pruning.count",
            label="k",
            low=0.05,
            high=1,
            log=True,
            unit="excess",
            levels=(0.05, 0.2, 1),
            when={"pruning.schedule": ("interval",)},
        ),
        Parameter(key="pruning.start", label="start", low=0.05, high=0.3, unit="steps", levels=(0.05, 0.3)),
        Parameter(key="pruning.final", label="steps after the end", low=0.1, high=0.4, unit="steps", levels=(0.1, 0.4)),
        Parameter(key="pruning.score", label="score", choices=("smoothed", "sensitivity")),
    ),
)
