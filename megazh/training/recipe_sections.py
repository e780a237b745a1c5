"""The sections of a recipe: every key with its type, its default, and a docstring that `megazh recipe show` prints."""

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megazh.config import Config, choice
from megazh.index.choices import Packing
from megazh.index.manifest import Amount
from megazh.model.config import Count, Positive, Share
from megazh.pipeline.precision import Dtype, Precision
from megazh.pipeline.role import Role
from megazh.run.trackers.tracker import TrackerName
from megazh.settings import Synonym
from megazh.training.amounts import ByTokens, Span
from megazh.training.course import Kind

MAY_CHANGE = "may change on resume"
"""Mark of a key that may differ between a run and its resume. Keys without a mark are fixed: they decide the result."""

Every = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class StageCosts(StrEnum):
    """Source of the layer costs that decide how the model is cut into stages."""

    AUTO = "auto"
    """Measured on CUDA; FLOPs on the CPU, where a clock would make runs differ."""
    FLOPS = "flops"
    MEASURED = "measured"


class Kernels(StrEnum):
    """Implementation of blocks, head and loss on CUDA."""

    AUTO = "auto"
    """Triton kernels where card, model and C compiler allow; the log says why not."""
    TORCH = "torch"
    """Plain torch: slower, for comparison and for machines on which Triton fails."""


class Resume(StrEnum):
    """Behaviour of a run whose folder already holds checkpoints."""

    AUTO = "auto"
    """Resume from the newest checkpoint that is whole; start anew where there is none."""
    NEVER = "never"
    """Refuse to start: the run is meant to be a new one."""


def _resume(value: Any) -> Any:
    return Resume(value) if isinstance(value, str) and value in list(Resume) else value


class Device(StrEnum):
    """Device type that a run computes on."""

    AUTO = "auto"
    """CUDA where torch can use it, else the CPU."""
    CPU = "cpu"
    CUDA = "cuda"


class DataConfig(Config):
    """Training data."""

    manifest: Annotated[str, MAY_CHANGE]
    """Mixture manifest, `data_index/NAME.yaml`, or the PREFIX of a single index; relative to the current folder. On
    resume the path may change; corpora, tokenizer and seed may not."""
    stories: Annotated[Count | None, MAY_CHANGE] = None
    """Number of made-up stories to write and index where the manifest is missing (the demo)."""
    packing: Annotated[Packing, choice(Packing)] = Packing.BEST_FIT
    """Rule by which documents are packed into samples."""
    max_docs: Annotated[int | None, Field(ge=2)] = None
    """Largest number of segments per sample. Default: seq_len / 8, at least 16."""
    allow_change: Annotated[bool, MAY_CHANGE] = False
    """Whether a run may go on with other data than it was begun with, from the number of samples that it has consumed.
    What changed is printed; the tokenizer stays."""
    workers: Annotated[int, Field(ge=0), MAY_CHANGE] = 2
    """Threads that gather samples ahead of time."""


class BatchConfig(Config):
    """Size of an optimizer step."""

    seq_len: Annotated[int, Field(ge=2)]
    """Tokens per sample."""
    micro_batch_size: Annotated[Count, MAY_CHANGE]
    """Samples per micro-batch: what one GPU computes at a time."""
    global_batch_size: Count
    """Samples per optimizer step over all GPUs; a multiple of micro_batch_size times the replicas. With
    schedule.batch, that of the first steps."""
    gradient_accumulation_steps: Annotated[Count | None, MAY_CHANGE] = None
    """Micro-batches per optimizer step and replica. Default: global_batch_size / (micro_batch_size x replicas)."""


class AttentionPattern(StrEnum):
    """Tokens that a token of the same document attends to in training."""

    FULL = "full"
    """All tokens up to itself."""
    S2 = "s2"
    """Those of its group (shifted sparse attention of LongLoRA, arXiv 2309.12307): half of the heads have groups that
    are shifted by half a group. An approximation, which saves time where documents are longer than a group (on an
    H100, steps of 8,192 tokens per sample are 1.5 times as fast, of 16,384 2.2 times), and no memory."""


class AttentionConfig(Config):
    """Attention in training. Validation, sampling and exported models always have full attention."""

    pattern: Annotated[AttentionPattern, choice(AttentionPattern)] = AttentionPattern.FULL
    """Tokens that a token attends to: full or s2."""
    group_tokens: Annotated[int, Field(ge=2, multiple_of=2)] = 2048
    """Tokens per group, where pattern is s2: an even number, whatever the length of a sample. Groups are counted from
    the start of each document; a document of at most as many tokens has full attention."""


class NoiseConfig(Config):
    """Noise in training. Validation and sampling have none."""

    neftune_alpha: NotNegative = 0.0
    """Strength of uniform noise on embedded tokens (NEFTune, arXiv 2310.05914): up to neftune_alpha / sqrt(tokens of
    the document x hidden_size). 0: none; the paper has 5, 10 and 15. Passes are not recorded as CUDA graphs with it."""


class OptimizerName(StrEnum):
    """Optimizers. A change on resume starts the state anew."""

    ADAMW = "adamw"
    """AdamW (arXiv 1711.05101) with torch's fused kernel."""
    MUON = "muon"
    """Muon for the matrices of blocks, AdamW for the rest."""
    ADAMW8BIT = "adamw8bit"
    """AdamW with 8-bit state (arXiv 2110.02861); needs a GPU and bitsandbytes."""
    FUSED_ADAM = "fused_adam"
    """AdamW with the kernel of NVIDIA's apex; needs a GPU and apex."""


class MuonConfig(Config):
    """Muon (kellerjordan.github.io/posts/muon) for the matrices of blocks."""

    momentum: Annotated[Share, MAY_CHANGE] = 0.95
    """Decay rate of the running average of gradients."""
    nesterov: Annotated[bool, MAY_CHANGE] = True
    """Whether the update looks one step ahead (Nesterov momentum)."""
    iterations: Annotated[int, Field(ge=1, le=20), MAY_CHANGE] = 5
    """Newton-Schulz iterations per update."""
    match_adamw: Annotated[bool, MAY_CHANGE] = True
    """Whether updates are scaled to the usual size of AdamW's, 0.2 sqrt(max(rows, columns)) (arXiv 2502.16982), so that
    both take the same learning rate. If false, they are scaled by sqrt(max(1, rows / columns))."""
    learning_rate_ratio: Annotated[Positive, MAY_CHANGE] = 1.0
    """Learning rate of the matrices relative to learning_rate."""


class OptimizerConfig(Config):
    """The optimizer and the objective that it minimizes."""

    name: Annotated[OptimizerName, choice(OptimizerName), MAY_CHANGE] = OptimizerName.ADAMW
    """Optimizer. A change on resume starts its state anew."""
    learning_rate: Annotated[Positive, MAY_CHANGE]
    """Peak learning rate, reached when warm-up ends."""
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the running averages of gradients and squared gradients."""
    eps: Positive = 1e-8
    """Constant added to the denominator of the update."""
    weight_decay: Annotated[NotNegative, MAY_CHANGE] = 0.1
    """Decoupled weight decay of the roles in `decayed`."""
    decayed: Annotated[list[Annotated[Role, choice(Role)]], MAY_CHANGE] = Field(
        default_factory=lambda: [Role.EMBEDDING, Role.HEAD, Role.MATRIX]
    )
    """Roles of the parameters that weight decay acts on; a matrix is a 2-D weight of a block, and a tied head is an
    embedding."""
    max_grad_norm: Annotated[NotNegative, MAY_CHANGE] = 1.0
    """Global norm that gradients are clipped to; 0 turns clipping off."""
    z_loss: NotNegative = 0.0
    """Weight of the squared log-sum-exp of the logits in the training loss (PaLM, arXiv 2204.02311)."""
    muon: Annotated[MuonConfig, MAY_CHANGE] = MuonConfig()
    """Settings of Muon, where name is muon."""


class ScheduleConfig(Config):
    """Length of the run, learning rate, batch and length of segments over its steps, and seed."""

    tokens: Annotated[Amount | None, MAY_CHANGE] = None
    """Length of the run in tokens, such as 500M or 30B; give this or steps."""
    steps: Annotated[Count | None, MAY_CHANGE, Synonym("max_steps")] = None
    """Length of the run in optimizer steps; give this or tokens. On the command line also max_steps=N."""
    kind: Annotated[Kind, choice(Kind), MAY_CHANGE] = Kind.COSINE
    """Shape of the learning rate behind the warm-up: cosine and linear fall to the last step, wsd stays at the peak and
    falls over the steps of decay, constant stays, inverse_sqrt falls with the root of the steps."""
    warmup: Annotated[Span, MAY_CHANGE] = 0.01
    """Length of the linear warm-up: steps, tokens such as 2M, or below 1 a share of the steps. A run that goes on with
    another length keeps the warm-up of its first start where this is a share."""
    decay: Annotated[Span, MAY_CHANGE] = 0.1
    """Length of the fall at the end of kind=wsd: steps, tokens such as 2B, or below 1 a share of the steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1), MAY_CHANGE] = 0.1
    """Learning rate at the last step of cosine, linear and wsd, relative to learning_rate."""
    batch: Annotated[ByTokens | None, MAY_CHANGE] = None
    """Samples per optimizer step by the tokens consumed before it, such as {0: 128, 2B: 256, 8B: 768}; the first is
    batch.global_batch_size. May change on resume for tokens that are not consumed. Default: that size throughout."""
    length: Annotated[ByTokens | None, MAY_CHANGE] = None
    """Tokens of the longest segment by the tokens consumed before a step, such as {0: 64, 1B: 128, 3B: 512, 6B: 1024}:
    longer pieces of documents are cut, and tokens do not see those of another segment; position ids begin anew. Tokens
    per step stay, and validation is not cut. May change on resume for tokens that are not consumed. Default:
    batch.seq_len throughout, no cuts."""
    label_at_cut: bool = True
    """Whether the last token of a segment that ends at such a cut is trained to predict the next token of the document,
    as at the end of a sample; if false, it is not trained."""
    allow_bend: Annotated[bool, MAY_CHANGE] = False
    """Whether a run may go on along a curve of the learning rate by which steps already done would have had other
    rates, as with another number of steps and kind=cosine. The new curve applies from the next step on."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of initial weights and dropout. The order of data follows the manifest's seed."""


class ParallelConfig(Config):
    """Work of the GPUs: how many there are, and what each of them computes."""

    num_gpus: Annotated[Count | None, MAY_CHANGE] = None
    """Number of GPUs (on the CPU: ranks) if the command gives none; fewer if the machine has fewer. Default: all."""
    device: Annotated[Device, choice(Device), MAY_CHANGE] = Device.AUTO
    """Device type that the run computes on."""
    pipe_parallel_size: Annotated[Count, MAY_CHANGE] = 1
    """Pipeline stages; replicas are GPUs / stages."""
    stage_costs: Annotated[StageCosts, choice(StageCosts), MAY_CHANGE] = StageCosts.AUTO
    """Source of the layer costs that decide the cut into stages."""
    stage_bounds: Annotated[list[int] | None, MAY_CHANGE] = None
    """Cut into stages by hand, over the parts of the model: embedding, blocks, head. `[0, 19, 26]`: embedding and 18
    blocks, then 6 blocks and the head. Default: the best cut by stage_costs."""
    memory_limit_gib: Annotated[Positive | None, MAY_CHANGE] = None
    """GPU memory in GiB that the cut must respect and torch may allocate. Default: what the card has."""
    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Whether blocks are recomputed in the backward pass, which saves the memory of their activations."""
    kernels: Annotated[Kernels, choice(Kernels), MAY_CHANGE] = Kernels.AUTO
    """Implementation of blocks, head and loss on CUDA."""
    cuda_graph: Annotated[bool, MAY_CHANGE] = True
    """Whether the kernels of each pass of a micro-batch are launched as one CUDA graph; needs Triton kernels."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """ZeRO stage: 1, which shards the optimizer state over the replicas. With -t hf also 0, which shards nothing, and
    2, which shards gradients as well."""
    gpu_bandwidth: Annotated[Positive, MAY_CHANGE] = 10.0
    """Assumed GB/s from one GPU to another in the same host. With network_bandwidth it decides which ranks of a run on
    several hosts go to which host; it changes no result."""
    network_bandwidth: Annotated[Positive, MAY_CHANGE] = 1.25
    """Assumed GB/s from one host to the others in each direction: 1.25 is 10 Gbit/s Ethernet, 25 is HDR InfiniBand."""
    check_tied_every: Annotated[Every, MAY_CHANGE] = 100
    """Steps between comparisons of the two copies of a tied embedding; 0: only at the end."""


class PrecisionConfig(Config):
    """Dtypes. Master weights and optimizer state are fp32 whatever these say."""

    dtype: Annotated[Dtype | Literal["auto"], choice(Dtype, "auto")] = Dtype.BF16
    """Dtype of weights and activations; auto is bf16 on CUDA and fp32 on the CPU."""
    grad_accum_dtype: Annotated[Dtype | None, choice(Dtype)] = None
    """Dtype of gradient accumulation over micro-batches: fp32."""
    communication_dtype: Annotated[Dtype | None, choice(Dtype)] = None
    """Dtype of the data-parallel gradient reduction. Default: grad_accum_dtype."""

    def on(self, device: Device) -> Precision:
        """The dtypes of a run on this device type."""
        compute = (Dtype.BF16 if device is Device.CUDA else Dtype.FP32) if self.dtype == "auto" else Dtype(self.dtype)
        accumulation = self.grad_accum_dtype or Dtype.FP32
        return Precision(compute, accumulation, self.communication_dtype or accumulation)


class CheckpointConfig(Config):
    """Checkpoints and resume."""

    checkpoint_every: Annotated[Every, MAY_CHANGE] = 1000
    """Steps between checkpoints; 0: only at the end."""
    resume: Annotated[Resume | str, BeforeValidator(_resume), MAY_CHANGE] = Resume.AUTO
    """Checkpoint of this run to resume from: auto, the newest that is whole; never, refuse where there is any; or the
    path of one, such as step_00001000. Later ones get another name then."""
    initial_checkpoint: str | None = None
    """Path of another run (its newest checkpoint is taken), of a checkpoint, of an imported folder or of a Hugging Face
    folder, whose weights this run begins with. The optimizer starts clean, at step 0. Default: random weights."""
    keep_last: Annotated[Every, MAY_CHANGE] = 3
    """Number of newest checkpoints that are kept; 0: all are kept."""
    keep_every: Annotated[Every, MAY_CHANGE] = 0
    """Steps between checkpoints that are kept for good: those whose step is a multiple; 0: none."""
    keep_best: Annotated[bool, MAY_CHANGE] = True
    """Whether the checkpoint of the lowest validation loss is kept."""


class Spike(StrEnum):
    """Reaction to a step whose loss and gradient norm spike."""

    SKIP = "skip"
    """The step changes no weight; training goes on with the next one."""
    ROLLBACK = "rollback"
    """Training goes back to the last checkpoint of an interval, and on with the data that comes after the spike."""
    IGNORE = "ignore"
    """The step is taken as any other."""


class GuardConfig(Config):
    """Reaction to spikes of the loss, see `megazh.training.guard`. Steps whose loss or gradient is not finite are
    skipped whatever these say."""

    spike: Annotated[Spike | None, choice(Spike), MAY_CHANGE] = None
    """Reaction to a step whose loss and gradient norm both exceed the mean of the last `window` steps by more than
    `deviations` standard deviations. Default: skip; with -t hf, which sees a loss after the update only, ignore."""
    window: Annotated[int, Field(ge=2, le=10_000), MAY_CHANGE] = 128
    """Accepted steps that a step is compared with; until so many are known, nothing is a spike."""
    deviations: Annotated[Positive, MAY_CHANGE] = 6.0
    """Standard deviations above the mean from which a step is a spike."""
    limit: Annotated[Count, MAY_CHANGE] = 10
    """Number of spikes within `limit_steps` steps that ends the run with exit code 6; with `rollback`, also that of
    spikes in a row that lead back to the same checkpoint, however many steps lie between them."""
    limit_steps: Annotated[Count, MAY_CHANGE] = 1000
    """Steps within which `limit` counts."""


class EvaluationConfig(Config):
    """Validation and sampled continuations during training."""

    validate_every: Annotated[Every, MAY_CHANGE] = 1000
    """Steps between validations; 0: only before the first and after the last step."""
    validation_samples: Annotated[Count | None, MAY_CHANGE] = None
    """Largest number of samples to validate on. Default: all."""
    sample_every: Annotated[Every, MAY_CHANGE] = 0
    """Steps between sampled continuations; 0: only at the end."""
    sample_prompts: Annotated[list[str], MAY_CHANGE] = Field(default_factory=lambda: ["从前，"])
    """Prompts that the model continues. Where the data are conversations: questions that it answers, put by their
    template."""
    sample_tokens: Annotated[Count, MAY_CHANGE] = 64
    """Largest number of tokens in a sampled continuation or answer."""


class ControlConfig(Config):
    """When an attempt stops by itself."""

    max_hours: Annotated[Positive | None, MAY_CHANGE] = None
    """Hours from the start of an attempt after which it saves and ends with exit code 75, to be started again; with 2
    if they were over before its first step. Default: no limit."""
    hang_minutes: Annotated[NotNegative, MAY_CHANGE] = 30.0
    """Minutes without a sign of progress (a micro-batch, a step, a piece of a validation, a sampled token, a file of a
    checkpoint) after which a run is taken for one that hangs: its stacks are logged, and it ends with exit code 5;
    0: never."""


class LoggingConfig(Config):
    """Trackers, reference figures that logs and plans compare with, and what is logged besides."""

    trackers: Annotated[list[Annotated[TrackerName, choice(TrackerName)]], MAY_CHANGE] = Field(default_factory=list)
    """Services that show the run besides TensorBoard: wandb, swanlab, mlflow. Each needs the extra of its name."""
    project: Annotated[str, MAY_CHANGE] = "megazh"
    """Project of the trackers that the run belongs to."""
    peak_tflops: Annotated[Positive | None, MAY_CHANGE] = None
    """Peak TFLOP/s of one GPU for MFU. Default: the data sheet's, where the card is known."""
    reference_days: Annotated[Positive | None, MAY_CHANGE] = None
    """Days that such a run took or was estimated at elsewhere, for `megazh plan` to show beside its projection."""
    reference_card: Annotated[str | None, MAY_CHANGE] = None
    """Card of reference_days, as `megazh plan --card` names it; other cards are not compared."""
    reference_gpus: Annotated[Count | None, MAY_CHANGE] = None
    """Number of GPUs of reference_days; other numbers are not compared."""
    reference_tokens: Annotated[Amount | None, MAY_CHANGE] = None
    """Tokens of reference_days; the days of another length are in proportion."""
    slow_ranks_every: Annotated[Every, MAY_CHANGE] = 50
    """Steps between comparisons of the times that ranks compute, see `megazh.training.slow_ranks`: a rank that is 10 %
    slower than the others three times in a row is named with what differs; 0: never."""
    samples: Annotated[bool, MAY_CHANGE] = False
    """Whether the number and a hash of each sample that is trained on are written to RUN/logs, some 40 bytes a sample:
    an audit aid, see `megazh.training.sample_log`."""
