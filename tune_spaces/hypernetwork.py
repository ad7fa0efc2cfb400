"""Which hypernetwork: kind, width, heads, depth, shared or one for each layer."""

from tune_spaces.space import Parameter, Space

SPACE = Space(
    name="hypernetwork",
    description="Kind, size, depth and sharing of the hypernetworks.",
    parameters=(
        Parameter(key="hypernetwork.kind", label="kind", choices=("attention", "mlp", "cnn")),
        Parameter(key="hypernetwork.hidden_size", label="hidden size", choices=(24, 48, 96, 192, 312)),
        Parameter(
            key="hypernetwork.heads", label="heads", choices=(2, 4, 12), when={"hypernetwork.kind": ("attention",)}
        ),
        Parameter(key="hypernetwork.layers", label="depth", choices=(1, 2)),
        Parameter(key="hypernetwork.per_layer", label="one per layer", choices=(False, True)),
    ),
)
