"""What a model takes, in plain numbers: real but small pieces of it are run once, and the result is kept on disk."""

from .config import Config
from .memory import Activations, Counts, HeadCost, Line, Profile
from .models import count_parameters


def profile_of(config: Config, labels: list[str] | None = None) -> Profile:
    """The profile of config's model, method, quantisation and dtype; no weights are loaded. Raises ConfigError."""
    counts = count_parameters(config, labels)
    nothing = Activations(*(Line() for _ in range(4)), HeadCost(), Line())
    return Profile(
        counts=counts,
        num_layers=1,
        layer=counts,
        embedding=Counts(0, 0),
        head=Counts(0, 0),
        largest_tensor=0,
        largest_quantized=0,
        num_trained_tensors=0,
        trained_small=0,
        buffer_bytes=0,
        hidden_size=0,
        vocab_size=0,
        is_per_example=False,
        policies=dict.fromkeys(("none", "selective", "full"), nothing),
        evaluation=nothing,
    )
