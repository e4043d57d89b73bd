"""Every config key of Overture, with its type, default, unit and meaning: the YAML is this, merged.

Only the standard library is imported here, so that a config can be checked before torch is.
Names follow Composer, mosaicml/examples and llm-foundry where these have one. `{run_name}` in any
path is replaced by the run's name. Durations are Composer's: `3ep` epochs, `200ba` batches,
`1000sp` samples, `2000000tok` tokens; intervals may also be a share of the run, as in `0.25dur`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Task = Literal["causal_lm", "masked_lm", "instruct", "chat", "seq2seq", "classify"]
# The door that runs each of them.
DOORS = {
    "causal_lm": "main.py", "masked_lm": "main.py",
    **dict.fromkeys(("instruct", "chat", "seq2seq", "classify"), "finetune.py"),
}  # fmt: skip
Score = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
BleuTokenizer = Literal["13a", "none", "intl", "char", "zh", "ja-mecab", "ko-mecab"]
Schedule = Literal["constant_with_warmup", "cosine_with_warmup", "linear_decay_with_warmup"]


@dataclass
class ModelConfig:
    # A hub name, a folder in Hugging Face format, a run folder, or (with pretrained: false) a
    # model type such as `llama` or `gpt2`, our `mosaic_bert`, or `hf_bert` for transformers' bert.
    name: str
    pretrained: bool = True  # false: weights are initialised from `config`
    # Type of the weights. LoRA keeps its adapters in float32 over a bfloat16 base.
    dtype: Literal["float32", "bfloat16"] = "float32"
    # auto: ours, within documents (blocks on a CPU, FlashAttention's varlen kernel on CUDA), where
    # the family uses transformers' attention interface; else sdpa, torch's fused kernels.
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    config: dict[str, Any] = field(default_factory=dict)  # overrides: hidden_size, ...
    # trainable: lora: adapters to go on with, of a run, a folder of peft's or the hub, not fresh.
    adapter: str | None = None
    # The base in 4 bits (QLoRA, Dettmers et al. 2023, 2305.14314) or 8; CUDA with bitsandbytes.
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    trust_remote_code: bool = False  # run the Python code of a hub model; only if you have read it
    # Keep no activations within layers but make them again in the backward pass: a third more
    # arithmetic for a fraction of the memory.
    activation_checkpointing: bool = False


@dataclass
class LoraConfig:
    r: int = 16  # rank of each adapter
    alpha: float = 32.0  # adapters are scaled by alpha / r
    rslora: bool = False  # by alpha / sqrt(r): rank-stabilised (Kalajdzievski 2023, 2312.03732)
    dora: bool = False  # a magnitude of its own for each output (Liu et al. 2024, 2402.09353)
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"  # or names of modules: [q_proj, v_proj]


@dataclass
class DatasetConfig:
    split: str = "train"
    shuffle: bool = False
    shuffle_seed: int | None = None  # default: seed
    # masked_lm: share of a row's tokens to predict; default: 0.3 in train_loader, 0.15 in
    # eval_loader, where it is the same ones each time.
    mlm_probability: float | None = None


@dataclass
class StreamConfig:
    """One of several datasets that are mixed. In an epoch a row comes once, on average `repeat`
    times, or `choose` rows are drawn; or else each stream has its `proportion` of an epoch, which
    is as long as all of them together.
    """

    data_local: str
    data_remote: str | None = None
    split: str = "train"
    proportion: float | None = None  # these are relative to each other: 1 and 3, or 0.25 and 0.75
    repeat: float | None = None
    choose: int | None = None


@dataclass
class LoaderConfig:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    # Several datasets by names of your own, in place of data_local and dataset.split.
    streams: dict[str, StreamConfig] = field(default_factory=dict)
    num_workers: int = 0
    drop_last: bool = False


@dataclass
class OptimizerConfig:
    # adamw is torch's fused kernel; decoupled_adamw is Composer's (weight decay not times lr).
    name: Literal["adamw", "decoupled_adamw"] = "adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class SchedulerConfig:
    name: Schedule = "cosine_with_warmup"
    t_warmup: str = "0.0dur"  # in the unit of max_duration, or a share of it
    alpha_f: float | None = None  # final share of optimizer.lr; default: 0.1 where it decays


@dataclass
class MonitorConfig:
    """A part of Composer's without options of interest: `lr_monitor: {}` switches it on."""


@dataclass
class GradientClippingConfig:
    clipping_type: Literal["norm", "value", "adaptive"] = "norm"
    clipping_threshold: float = 1.0


@dataclass
class EmaConfig:
    """Exponential moving average of the weights: it is what is evaluated and exported."""

    half_life: str = "1000ba"  # in steps


@dataclass
class SeqLengthWarmupConfig:
    """Documents begin as pieces of min_seq_length tokens, which grow to max_seq_len."""

    duration: float = 0.3  # share of the run after which documents are whole
    min_seq_length: int = 64
    step_size: int = 8  # pieces grow by multiples of this


# Of Composer's algorithms, why some are none of ours; the rest are of images.
NOT_HERE = {
    "alibi": "rebuilds the model, so that none could load it; model.name: mosaic_bert has it",
    "gated_linear_units": "rebuilds the model, so that none could load it; mosaic_bert has them",
    "label_smoothing": "is label_smoothing here, a key of its own",
    "layer_freezing": "is trainable here, which names what is trained",
    "mixup": "needs a loss outside of the model",
    "sam": "takes two passes a step, one of which no guard would see",
    "swa": "is ema here, which averages as it goes",
}


@dataclass
class AlgorithmsConfig:
    """Those of Composer's that work here; see NOT_HERE for others."""

    gradient_clipping: GradientClippingConfig | None = None
    ema: EmaConfig | None = None
    # torch's LayerNorm in the precision of autocast; needs a CUDA device.
    low_precision_layernorm: MonitorConfig | None = None
    seq_length_warmup: SeqLengthWarmupConfig | None = None


@dataclass
class LossTargetConfig:
    # Training stops as soon as eval cross-entropy (nats per label token; of a classifier per row,
    # of a regression the squared error) is at or below this.
    cross_entropy: float


@dataclass
class EarlyStopConfig:
    """Ends training once eval cross-entropy has not fallen in `patience` evaluations."""

    patience: int = 3
    min_delta: float = 0.0  # in nats; less than this is no fall
    keep_best: bool = True  # what the run gives is the model of the best evaluation, not the last


@dataclass
class MLPerfLogConfig:
    """Writes <run_folder>/mlperf.log, in the events of MLPerf's LoRA benchmark."""

    benchmark: str = "overture_lora"  # a name of your own: it is none of MLPerf's


@dataclass
class SpeedMonitorConfig:
    window_size: int = 10


@dataclass
class ThroughputConfig:
    window: int = 10  # steps that the rates are taken over
    measure_peak: bool = False  # MFU by a matrix product timed at the start, on a CPU too


@dataclass
class CallbacksConfig:
    loss_target: LossTargetConfig | None = None
    early_stop: EarlyStopConfig | None = None
    mlperf_log: MLPerfLogConfig | None = None
    throughput: ThroughputConfig = field(default_factory=ThroughputConfig)  # always on
    speed_monitor: SpeedMonitorConfig | None = None
    lr_monitor: MonitorConfig | None = None
    memory_monitor: MonitorConfig | None = None
    runtime_estimator: MonitorConfig | None = None


@dataclass
class TensorboardConfig:
    log_dir: str | None = None  # default: <run_folder>/tensorboard


@dataclass
class WandbConfig:
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class MlflowConfig:
    experiment_name: str | None = None
    tracking_uri: str | None = None


@dataclass
class LoggersConfig:
    tensorboard: TensorboardConfig | None = None
    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None


@dataclass
class GenerationConfig:
    """Answers to held-out prompts before and after training, scored by exact match and by F1 of
    characters; of seq2seq at every evaluation, by BLEU and chrF (sacrebleu).
    """

    num_prompts: int = 200
    max_new_tokens: int = 64
    batch_size: int = 50
    num_beams: int = 1  # 1: greedy
    # seq2seq: so many translations in the log and the report, at every evaluation; default: 3
    num_shown: int | None = None
    # seq2seq: how sacrebleu divides the texts; default: 13a, or `char` where most of their letters
    # are Japanese or Chinese. `none` keeps the spaces as they are; the two of mecab need
    # `pip install sacrebleu[ja,ko]`.
    bleu_tokenize: BleuTokenizer | None = None


@dataclass
class ResumeConfig:
    # What may differ from when the run was begun: top-level keys, and dataset, tokenizer, model.
    allow: list[str] = field(default_factory=list)


@dataclass
class GuardsConfig:
    # A loss or gradient that is not finite ends the run, or its step is skipped up to max_skips.
    non_finite: Literal["stop", "skip"] = "stop"
    max_skips: int = 3
    # Seconds without a finished batch, of training or evaluation, that end the run; 0 waits on.
    timeout: float = 1800.0
    # A loss far above the recent ones is marked in the log, or ends the run.
    loss_spike: Literal["mark", "stop"] = "mark"


@dataclass
class FSDPConfig:
    """Weights, gradients and optimizer in shards, one for each rank: FSDP2 through Composer."""

    # false: what a layer's forward pass has gathered is kept for the backward pass.
    reshard_after_forward: bool = True
    # Gradients are added up over ranks in float32, or with PURE in the type of `precision`.
    mixed_precision: Literal["DEFAULT", "PURE"] = "DEFAULT"
    # full: rank zero gathers and writes a checkpoint like any other. sharded: each rank writes its
    # own part, into a folder that all nodes share. Any number of ranks goes on from either.
    state_dict_type: Literal["full", "sharded"] = "full"
    # Shards, their gradients and the optimizer lie in the host's memory, where the optimizer steps;
    # a GPU holds the layer that it computes, and its activations. For one rank too.
    cpu_offload: bool = False


@dataclass
class Config:
    task: Task
    model: ModelConfig
    max_seq_len: int
    max_duration: str
    global_train_batch_size: int  # samples (rows of a shard) per optimizer step, over all ranks
    run_name: str = ""  # default: the YAML's file name
    seed: int = 17
    tokenizer_name: str | None = None  # a folder or hub name; default: model.name
    # Shards are read from data_local/<split>. With data_remote they are downloaded to data_local.
    # To mix several datasets, see train_loader.streams.
    data_remote: str | None = None
    data_local: str | None = None
    train_loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval_loader: LoaderConfig | None = None
    # lora: adapters, and the head of a classifier. last_layer: that head alone, or the last block
    # of a language model and what follows it. Or patterns of names: ["*.mlp.*", "*norm*"].
    trainable: str | list[str] = "all"
    lora: LoraConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    algorithms: AlgorithmsConfig = field(default_factory=AlgorithmsConfig)
    eval_interval: str = "1ep"
    eval_first: bool = False  # evaluate before the first step too: the base model
    # Of a classifier; default: accuracy, f1 (of class 1 where there are two, else the mean over
    # classes) and matthews, or pearson and spearman of a regression.
    metrics: list[Score] | None = None
    # Rows that a rank passes through the model at once, or all of its batch where that has fewer.
    device_train_microbatch_size: int | Literal["auto"] = 1
    device_eval_batch_size: int = 1
    # Autocast precision of the forward pass over float32 weights; CPUs take fp32 and amp_bf16. On a
    # GPU products of fp32 are made in TF32, as Composer sets it.
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    # torch.compile for the layers of the model while it is trained and evaluated; needs a C++
    # compiler. The first steps take minutes; benchmarks/RESULTS.md says where it pays.
    compile: bool = False
    # Several ranks: without it each holds the whole model (DDP).
    fsdp_config: FSDPConfig | None = None
    run_folder: str = "runs/{run_name}"
    save_folder: str | None = None  # may be s3://, gs://, ...; default: <run_folder>/checkpoints
    save_interval: str = "1ep"
    save_num_checkpoints_to_keep: int = 2  # with two there is one to go back to; -1 keeps all
    # A checkpoint (or a run) to start from; weights, optimizer and place in the data are restored.
    load_path: str | None = None
    load_unverified: bool = False  # load one not of this kit, a pickle: only from people you trust
    load_weights_only: bool = False
    autoresume: bool = True  # the same command goes on from the newest checkpoint
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    generation: GenerationConfig | None = None
    # seq2seq: share of the truth that the training loss spreads over all pieces.
    label_smoothing: float = 0.0
    # A bar at the terminal, or (progress_bar: false) a block of lines every console_log_interval.
    progress_bar: bool = True
    console_log_interval: str | None = None

    def streams(self, loader: LoaderConfig) -> dict[str, StreamConfig]:
        """Return what a loader reads: its streams, or the split of data_local by its own name."""
        split = loader.dataset.split
        return loader.streams or {split: StreamConfig(self.data_local, self.data_remote, split)}

    def splits(self) -> Iterator[tuple[str, StreamConfig, int]]:
        """Yield (name, where it is, how many rows it must have) of every split that is read."""
        batches = {"train_loader": self.global_train_batch_size, "eval_loader": 1}
        for key, batch in batches.items():
            if loader := getattr(self, key):
                for name, stream in self.streams(loader).items():
                    mixed = bool(loader.streams)  # then a batch is filled from all of them
                    yield (f"{key}.{name}", stream, 1) if mixed else (name, stream, batch)


GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]


@dataclass
class GlueConfig:
    """Keys of yamls/glue/: `finetune.py` once for each task and seed; see training/glue.py."""

    # Keys of Config for every job, over those of the table in training/glue_tasks.py.
    finetune: dict[str, Any]
    # A hub dataset with GLUE's subsets, or a folder of its tsv files: CoLA/train.tsv, ...
    data: str = "nyu-mll/glue"
    run_name: str = ""  # default: the YAML's file name
    tasks: list[GlueTask] = field(default_factory=lambda: [*get_args(GlueTask)])
    # The largest tasks (MNLI, QQP, QNLI) run with the first one only.
    seeds: list[int] = field(default_factory=lambda: [17])
    # Keys of Config for one task: {cola: {max_duration: 5ep}}.
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    parallel: int | None = None  # jobs at once; default: one for each CUDA device, or one
    retries: int = 1  # of a job that failed, but not because of its config or data
    run_folder: str = "runs/glue/{run_name}"
    data_local: str = "data/glue/{run_name}"  # where the tasks are converted to
