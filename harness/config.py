"""The schema of a run: one frozen pydantic model per YAML section. Imports no torch.

Every section refuses unknown keys. A choice with options of its own is a discriminated union, so an illegal
combination cannot be written. Reading files and overrides is `config_io`, error sentences are `config_errors`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from .config_checks import impossible_combinations
from .config_hardware import Inline, Kernels, Launch, Memory
from .config_types import (
    Betas,
    Bytes,
    Fraction,
    Labels,
    Line,
    ModelFields,
    NotNegative,
    Pattern,
    Positive,
    Probability,
    Rank,
    Rate,
    RunName,
    Section,
    Seed,
    Text,
    as_list,
)


class Model(Section):
    path: Line | None = None
    """Hub id, folder, file (.gguf) or package:NAME/FILE."""
    init: ModelFields | None = None
    """Fields of a transformers config with its `model_type`: random weights instead of loaded ones."""
    revision: Line | None = None
    """Git revision of a hub id."""
    tokenizer: Line | None = None
    """Where the tokenizer or image processor is, if not with the model."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of weights and compute. With bf16 the optimizer keeps fp32 master weights of what is trained."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention back end of transformers; auto = sdpa where the model has it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off for models you have not read."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of path (load weights) and init (random weights); null removes one")
        return self


class NoQuantization(Section):
    type: Literal["none"] = "none"


class Nf4(Section):
    type: Literal["nf4"]
    double_quant: bool = True
    """Quantise the block scales as well (saves 0.37 bit per weight)."""
    embeddings: bool = False
    """Quantise the input embedding and the output head too; they must not be tied to each other or trained."""


class Int8(Section):
    type: Literal["int8"]


Quantization = Annotated[NoQuantization | Nf4 | Int8, Field(discriminator="type")]


class CausalLM(Section):
    type: Literal["causal_lm"]
    label_smoothing: Probability = 0.0
    neftune_alpha: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """NEFTune: uniform noise of alpha/sqrt(tokens*hidden) on the embeddings while training (arXiv 2310.05914)."""


class Classification(Section):
    labels: Labels | None = None
    """Class names in order; found in the training data (sorted) if left out."""
    label_smoothing: Probability = 0.0


class SequenceClassification(Classification):
    type: Literal["sequence_classification"]
    neftune_alpha: Annotated[float, Field(ge=0, le=1e6)] = 0.0


class ImageClassification(Classification):
    type: Literal["image_classification"]
    image_size: Annotated[int, Field(gt=0, le=10_000)] | None = None
    """Edge in pixels; the model's own size if left out."""


Task = Annotated[CausalLM | SequenceClassification | ImageClassification, Field(discriminator="type")]

Format = Literal["auto", "chat", "prompt_completion", "alpaca", "text", "classification", "image"]


class Source(Section):
    path: Line
    """File, folder, glob, hub id, fsspec URL, package:NAME/FILE, stdlib:docstrings or sklearn:digits."""
    format: Format = "auto"
    """How a row becomes an example; auto looks at the columns."""
    columns: dict[str, Line] = Field(default={})
    """Our column name -> the name in the file, for example {prompt: question, completion: answer}."""
    subset: Line | None = None
    """Configuration name of a hub dataset."""
    split: Line = "train"
    """Split of a hub dataset or datasets folder."""
    where: dict[str, Annotated[list[str | int | float | bool], Field(min_length=1)]] = Field(default={})
    """Keep the rows whose column (file's name) has one of these values."""
    limit: Positive | None = None
    """Use only the first rows that pass."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each row is seen per epoch: 2 = twice, 0.5 = a fresh half every epoch."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


Sources = Annotated[
    list[Source],
    BeforeValidator(as_list, json_schema_input_type=str | Source | list[str | Source]),
    Field(min_length=1, max_length=1000),
]


class Split(Section):
    """Cuts validation and test rows out of `train` when those have no sources of their own."""

    validation: Probability = 0.0
    test: Probability = 0.0
    by: Line | None = None
    """Column that keeps rows together: all rows with one value land in one split."""
    seed: Seed = 0

    @model_validator(mode="after")
    def _leaves_training_rows(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test must leave rows to train on (be below 1)")
        return self


class Data(Section):
    train: Sources
    validation: Sources | None = None
    test: Sources | None = None
    split: Split = Split()
    max_length: Annotated[int, Field(ge=2, le=10**8)] = 1024
    """Tokens per example; longer ones meet `truncation`."""
    truncation: Literal["right", "left", "drop", "error"] = "right"
    """right / left = cut that end, drop = leave the row out and count it, error = stop with exit code 4."""
    packing: bool = False
    """Join a micro-batch's examples into one row, attention kept apart: no padding is computed, same results."""
    loss_on: Literal["assistant", "completion", "all"] = "completion"
    """Tokens that are learned: every assistant turn, only the last answer, or everything."""
    chat_template: Text | None = None
    """Jinja template, a file that holds one, or `none`: never use one (prompt + completion + end token are joined token
    for token as TRL's SFTTrainer does it for plain text); the tokenizer's own if left out."""
    max_bad_fraction: Fraction = 0.01
    """Share of malformed rows above which the run stops with exit code 4."""
    max_row_bytes: Bytes = 1_000_000
    """A larger row counts as malformed."""
    cache_dir: Line | None = None
    """Where tokenised data and prepared weights are kept; runs/.cache beside the run directory if left out."""


class LoraOptions(Section):
    rank: Rank = 16
    alpha: Rate = 32.0
    dropout: Probability = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[Pattern], Field(min_length=1)] = "all-linear"
    """all-linear = every linear layer but the head; or names / regular expressions of modules."""
    rslora: bool = False
    """Scale by alpha/sqrt(rank) instead of alpha/rank (arXiv 2312.03732)."""
    rank_pattern: dict[Pattern, Rank] = Field(default={})
    """Rank for the modules that match a name or regular expression."""
    alpha_pattern: dict[Pattern, Rate] = Field(default={})
    modules_to_save: list[Line] = Field(default=[])
    """Modules trained whole and saved with the adapter, for example a new head."""


class Lora(LoraOptions):
    method: Literal["lora"]


class Dora(LoraOptions):
    method: Literal["dora"]


class Qlora(LoraOptions):
    method: Literal["qlora"]
    """LoRA over a quantised base; `quantization` must be nf4 or int8."""


class Full(Section):
    method: Literal["full"]


class Freeze(Section):
    method: Literal["freeze"]
    trainable: list[Pattern] = Field(default=[])
    """Regular expressions; a parameter whose name matches one is trained."""
    last_layers: NotNegative = 0
    """Train the last n transformer blocks or stages."""
    head: bool = True
    """Train the output head."""

    @model_validator(mode="after")
    def _something_is_trained(self) -> Self:
        if not (self.trainable or self.last_layers or self.head):
            raise ValueError("nothing would be trained: give trainable, last_layers or head")
        return self


Adapter = Annotated[Lora | Dora | Qlora | Full | Freeze, Field(discriminator="method")]


class OptimizerBase(Section):
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Applied to matrices only: norms, biases and other vectors are spared."""


class Adamw(OptimizerBase):
    name: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    eps: Rate = 1e-8


class Adamw8bit(OptimizerBase):
    name: Literal["adamw_8bit"]
    betas: Betas = (0.9, 0.999)
    eps: Rate = 1e-8
    paged: bool = False
    """Keep the state in memory that moves between GPU and host as it is needed; needs a GPU."""


class Sgd(OptimizerBase):
    name: Literal["sgd"]
    momentum: Probability = 0.0
    nesterov: bool = False


class Rmsprop(OptimizerBase):
    name: Literal["rmsprop"]
    alpha: Probability = 0.99
    eps: Rate = 1e-8
    momentum: Probability = 0.0


class Adafactor(OptimizerBase):
    name: Literal["adafactor"]


Optimizer = Annotated[Adamw | Adamw8bit | Sgd | Rmsprop | Adafactor, Field(discriminator="name")]


class Schedule(Section):
    lr: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_ratio: Fraction = 0.03
    warmup_steps: NotNegative | None = None
    """Overrides warmup_ratio."""
    min_lr_ratio: Fraction = 0.0
    """Final learning rate as a share of the peak."""
    decay_ratio: Fraction = 0.2
    """wsd only: share of the steps spent in the final linear decay."""


class Train(Section):
    max_steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = None
    global_batch_size: Positive = 8
    """Examples per optimizer step, over all workers; accumulation is derived from it."""
    micro_batch_size: Literal["auto"] | Positive = "auto"
    """Examples per forward pass on one worker."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1e9)] = 1.0
    """Clip the global gradient norm; 0 = off."""
    on_loss_spike: Literal["note", "skip"] = "note"
    """A loss far above those before: only note it, or leave the step out, so that its examples change no weight."""
    num_threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    """CPU threads per worker; the cores divided by the workers if left out."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of max_steps and epochs; null removes one")
        return self


class Checkpoint(Section):
    every_steps: Literal["auto"] | Positive | None = "auto"
    """Steps between checkpoints; auto = by what saving takes and how often so many machines fail, half an hour at most;
    empty = only at the end and on interruption."""
    keep: Positive = 2
    on_error: Literal["stop", "skip"] = "stop"
    """Where a checkpoint cannot be written (a full disk): end the run, or go on and try again when the next one is due.
    The last one of a run always counts."""


class Eval(Section):
    every_steps: Positive | None = None
    """Steps between validations; it always runs before the first and after the last step."""
    max_examples: Positive | None = None
    micro_batch_size: Positive | None = None


class Tracking(Section):
    tensorboard: bool = True
    log_every_steps: Positive = 1


class Generation(Section):
    prompts: Literal["auto"] | list[Text] = "auto"
    """Answered before and after training; auto = the first validation example's prompt, [] = none."""
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """0 = greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Config(Section):
    name: RunName
    """Names the run directory runs_dir/name."""
    runs_dir: Line = "runs"
    seed: Seed = 0
    model: Model
    quantization: Quantization = NoQuantization()
    task: Task
    data: Data
    adapter: Adapter
    optimizer: Optimizer = Adamw()
    schedule: Schedule = Schedule()
    train: Train
    memory: Memory = Memory()
    kernels: Kernels = Kernels()
    launch: Launch = Inline()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    tracking: Tracking = Tracking()
    generation: Generation = Generation()

    @property
    def makes_adapter(self) -> bool:
        """Whether the run's result is a PEFT folder (and not a whole model)."""
        return self.adapter.method in ("lora", "dora", "qlora")

    @field_validator("quantization", "optimizer", "launch", mode="before")
    @classmethod
    def _default_choice(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        tag = str(field.discriminator)
        return {tag: getattr(field.default, tag)} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if mistakes := impossible_combinations(self):
            raise ValueError("\n".join(mistakes))
        return self
