"""Every setting, as frozen dataclasses: YAML files and the command line both end here.

The module imports nothing heavy, so that `--help` answers at once. It is long because it is a list: one dataclass a section,
no code, in one place where a setting is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Counterfactual = Literal["skip", "zero", "renormalize"]
Storage = Literal["replay", "update", "gradient", "full"]
StoredDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from.

    Attributes:
        source: `generated` (invented biographies), `tofu` (a folder with full.jsonl, or a hub name), `jsonl`, or `log`: the
            samples that the log itself keeps (log.save_batch_data), for runs whose data another program prepared.
        path: Folder, file or hub name; not used by `generated` and `log`.
        rows: Row ranges `start:stop` of the source, separated by commas; ids stay those of the whole source.
        people: Invented people (`generated`).
        facts_per_person: Question/answer pairs per person (`generated`).
        seed: Seed of the generated corpus.
        max_length: Tokens per sample; longer ones are cut on the right.
        prompt: Template around the question; its tokens are not targets.
    """

    source: Literal["generated", "tofu", "jsonl", "log"] = "generated"
    path: str | None = None
    rows: str | None = None
    people: int = 60
    facts_per_person: int = 12
    seed: int = 0
    max_length: int = 256
    prompt: str = "Question: {question}\nAnswer: "


@dataclass(frozen=True)
class ModelConfig:
    """Which model is fine-tuned.

    Attributes:
        path: Pretrained checkpoint (folder or hub name), with its tokenizer; null builds one from `config`.
        config: Hugging Face model config (with `model_type`) of a model started from random weights.
        vocab_size: Vocabulary of the tokenizer trained on the data when `path` is null.
        attn_implementation: Attention kernel; null is the logged one, and sdpa where there is no log.
        dropout: Sets every dropout probability of the model config when given.
        trainable: Regular expression: parameters whose names it does not find are frozen; null trains all.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    vocab_size: int = 512
    attn_implementation: Literal["sdpa", "eager"] | None = None
    dropout: float | None = None
    trainable: str | None = None

    @property
    def attention(self) -> str:
        """The attention kernel where there is no log that says one."""
        return self.attn_implementation or "sdpa"


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained.

    Attributes:
        epochs: Passes over the data.
        max_steps: Stop after this many optimizer steps; null trains all epochs.
        batch_size: Samples per optimizer step, over all ranks.
        micro_batch_size: Samples per forward pass on one rank; accumulation follows from it.
        optimizer: `sgd` or `adamw`, torch's own.
        learning_rate: Peak learning rate.
        momentum: SGD momentum.
        weight_decay: Applied to matrices; vectors (norms, biases) are not decayed.
        schedule: Learning-rate schedule by its transformers name (constant, linear, cosine, ...).
        warmup_steps: Steps of linear warm-up.
        max_grad_norm: Global-norm clipping; 0 turns it off.
        seed: Of weights, order and dropout.
        engine: `deepspeed` (ZeRO stage 0 to 3), `fsdp2` (torch's fully_shard, a unit a block), `ddp`, or `single` (one
            process).
        replicas: Copies of the model that `fsdp2` keeps, each sharded over as many of the ranks (HSDP); 1 shards it over all.
        deepspeed: DeepSpeed JSON file; null is the built-in ZeRO-3 configuration.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int = 8
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 0.0
    seed: int = 0
    engine: Literal["deepspeed", "fsdp2", "ddp", "single"] = "deepspeed"
    replicas: int = 1
    deepspeed: str | None = None


@dataclass(frozen=True)
class LogConfig:
    """What training leaves behind.

    Attributes:
        storage: `replay` (ids, random state, snapshots), `update` (also u_s of every step), `gradient` (also g_s) or
            `full` (g_s and θ of every step).
        save_interval: Steps between snapshots; null keeps the first and the last only.
        max_steps: Ring: keep the tensors of the last steps only; null keeps all.
        update_dtype: `float32` keeps every θ_s to the bit; `bfloat16` halves u_s and carries its rounding error to the
            next step.
        gradient_dtype: Of g_s: `float32`, or `bfloat16` rounded to nearest.
        compression: `none`, or `zstd` of the tensors' shuffled bytes.
        buffer_mb: MiB of memory of each rank for steps that wait to be written; training waits when it is full.
        save_batch_data: Keep the tokens of every sample, once, so that unlearning needs no dataset.
        keep_first: With a ring: keep the first snapshot, from which what has left the ring can still be replayed, and the
            edits that such a replay comes past.
    """

    storage: Storage = "update"
    save_interval: int | None = 50
    max_steps: int | None = None
    update_dtype: StoredDtype = "float32"
    gradient_dtype: StoredDtype = "float32"
    compression: Literal["none", "zstd"] = "none"
    buffer_mb: float = 512
    save_batch_data: bool = False
    keep_first: bool = False


@dataclass(frozen=True)
class OnlineSettings:
    """How deletion requests are answered while training runs.

    Attributes:
        replay_head: `all`: exact replay on the live engine; or steps replayed before the recursion takes over, or `auto`.
        hessian_mode: Curvature of the recursion.
        damping: λ.
        head_tolerance: `auto`: relative difference at which the two count as one.
        max_growth: A correction that grew by more than this in one step is not trusted; null trusts any.
        fallback: What is done where a correction cannot be computed or trusted: `replay` from a snapshot, or `refuse`.
        poll_every: Steps between looks at the ledger.
        relearn_per_step: Companions of removed batches that each later batch takes up; 0 leaves them out.
        signing_key: PEM file of the Ed25519 key that signs the audit (`lmc audit keygen`); null does not sign.
    """

    replay_head: int | Literal["auto", "all"] = "all"
    hessian_mode: str = "GGN"
    damping: float = 0.0
    head_tolerance: float = 0.05
    max_growth: float | None = 4.0
    fallback: Literal["replay", "refuse"] = "replay"
    poll_every: int = 1
    relearn_per_step: int = 2
    signing_key: str | None = None


@dataclass(frozen=True)
class OnlineConfig(OnlineSettings):
    """Deletion requests that come while training runs (`lmc forget`, docs/online.md).

    Attributes:
        enabled: Whether training looks for them.
    """

    enabled: bool = False


@dataclass(frozen=True)
class RequestConfig:
    """A deletion request to a run that trains (`lmc forget`).

    Attributes:
        ids: Sample ids `3,17,20-29`, or a .json/.jsonl file of ids.
        batches: Batch ids of the log, which are taken back as a whole.
        unit: `sample` forgets the samples; `batch` takes back the batches that held them, and what else was in them is
            learned again later.
    """

    ids: str | None = None
    batches: str | None = None
    unit: Literal["sample", "batch"] = "sample"


@dataclass(frozen=True)
class ForgetConfig:
    """What to forget; give exactly one of samples, split and batches.

    Attributes:
        samples: Sample ids `3,17,20-29`, or a .json/.jsonl file of ids.
        split: A named split of the data, such as forget01 or person-7.
        batches: Batch ids `5,17` of the log: those steps are forgotten as a whole.
        counterfactual: `zero` or `renormalize` for samples, `skip` for batches; null picks renormalize or skip.
    """

    samples: str | None = None
    split: str | None = None
    batches: str | None = None
    counterfactual: Counterfactual | None = None


@dataclass(frozen=True)
class UnlearnConfig:
    """How the correction is computed (docs/method.md).

    Attributes:
        hessian_mode: Curvature of the propagation: `GGN`, `exact` (Hessian), `fd` (Hessian by differences of gradients),
            `secant` (the change of the gradient itself; not linear), `fisher` (of the logged batch gradient), `diag`
            (estimated diagonal of the GGN), `low_rank` (largest eigenpairs), or `none` (first-order rollback).
        probes: `diag`: products behind each step's estimate; 0 is the exact diagonal, for tiny models.
        rank: `low_rank`: eigenpairs.
        base: `low_rank`: whose, `GGN`, `exact` or `fd`.
        refresh: `low_rank`: steps that a basis serves.
        curvature: `low_rank`: name of a curvature that `lmc log curvature` left beside the log, used in place of the model.
        K: Steps a source is propagated; null is all.
        damping: λ ≥ 0 added to the curvature.
        replay_head: Steps, from the first that holds forgotten data on, that are taken as they are before the
            recursion takes over; `auto` until the two agree; `all` is exact replay on the engine that trained.
        head_tolerance: `auto`: relative difference at which they do.
        update: How the optimizer's steps are carried: `tangent`, linear in what is forgotten; or `finite`, as they are, with the
            same number of gradients: far closer under Adam and clipping, for one joint correction with K null. `auto` is
            `finite` there and `tangent` elsewhere.
        strategy: `given` does what these settings say; `auto` plans first (`lmc plan unlearn`) and does what is recommended,
            the fastest that is known to stay within plan_unlearn.max_error.
        tol: A vector stops once what it would still move, at its pace over the last ten steps, is below this share of it;
            null carries all to the end (or through K steps).
        units: `joint` computes the sum of all that is forgotten; `sample` or `batch` each one by itself; or a JSON file
            {name: [ids]} of users or other groups.
        unit_groups: Groups of ranks that take units from a queue, each with a sharded copy of the model; `auto` makes as
            many as leave each enough memory.
        block: Units that go along the trajectory together; `auto` is as many as fit, 8 at most.
        mark_every: Steps between two marks, of exact replay as of the recursion, from which a run that was cut off goes on;
            null leaves none.
        store_units: Keep each unit's correction in the output, so that it can be undone or added later.
        undo: Units, separated by commas, to take out of the finished run in output_dir.
        add: Units to put back into it.
    """

    hessian_mode: str = "GGN"
    probes: int = 8
    rank: int = 16
    base: str = "GGN"
    refresh: int = 10
    curvature: str | None = None
    K: int | None = None
    damping: float = 0.0
    replay_head: int | Literal["auto", "all"] = 0
    head_tolerance: float = 0.05
    update: Literal["tangent", "finite", "auto"] = "auto"
    strategy: Literal["given", "auto"] = "given"
    tol: float | None = None
    units: str = "joint"
    unit_groups: int | Literal["auto"] = 1
    block: int | Literal["auto"] = "auto"
    mark_every: int | None = 50
    store_units: bool = False
    undo: str | None = None
    add: str | None = None


@dataclass(frozen=True)
class PrivacyConfig:
    """Noise on the corrected weights, and what may be said of them then (docs/privacy.md).

    Attributes:
        basis: What bounds ‖θ̂ − θ_retrain‖: `exact` (replay: it is 0), `controls` (the residuals of random control deletions),
            `assumed` (constants that the user vouches for), or `heuristic` (nothing: noise without a claim); `off` adds none.
        epsilon: ε that the noise is made for.
        delta: δ of the noise; what a bound may fail with is added in the result.
        sigma: Noise of this size instead, ε then follows from it; `heuristic` needs it.
        controls: `controls`: control deletions, each replayed.
        confidence: `controls`: coverage of the bound, 1 − α.
        groups: `controls`: JSON file {name: [ids]} of users or other groups, of which the request is one; controls are
            others of them. Null draws as many samples or batches as the request has.
        bound: `assumed`: the bound itself.
        smoothness: `assumed`, in place of `bound`, with the next four: no curvature is above it.
        convexity: No curvature is below it.
        lipschitz: Of the Hessian.
        curvature_error: Of the curvature that is used, in the 2-norm.
        source: Norm of the gradient that a step loses, at most.
        subspace: Name of a curvature beside the log (`lmc log curvature`) whose eigenvectors shape the noise; null is
            isotropic.
        outside: Standard deviation outside that subspace, in those inside.
        seed_file: File of 64 hexadecimal digits that nobody else knows; null draws a seed and forgets it.
        draws: Pairs of noise draws behind the predicted loss.
        max_loss_change: Largest predicted change of the loss on retained samples; above it the run ends without noise.
    """

    basis: Literal["off", "exact", "controls", "assumed", "heuristic"] = "off"
    epsilon: float = 1.0
    delta: float = 1e-5
    sigma: float | None = None
    controls: int = 19
    confidence: float = 0.9
    groups: str | None = None
    bound: float | None = None
    smoothness: float | None = None
    convexity: float | None = None
    lipschitz: float | None = None
    curvature_error: float | None = None
    source: float | None = None
    subspace: str | None = None
    outside: float = 1.0
    seed_file: str | None = None
    draws: int = 4
    max_loss_change: float | None = None


@dataclass(frozen=True)
class SpectrumConfig:
    """What `lmc log spectrum` looks at.

    Attributes:
        step: Logged step; null is the middle of the run.
        mode: `GGN`, `exact` (Hessian) or `fd`.
        count: Eigenvalues of largest magnitude.
        products: Curvature products behind them.
        probes: Curvature products behind the trace.
        json: File for the results; null prints them only.
    """

    step: int | None = None
    mode: Literal["GGN", "exact", "fd"] = "GGN"
    count: int = 5
    products: int = 32
    probes: int = 16
    json: str | None = None


@dataclass(frozen=True)
class CurvatureConfig:
    """What `lmc log curvature` keeps.

    Attributes:
        name: Its folder, log_dir/curvature/NAME.
        base: `GGN` or `exact` (Hessian).
        rank: Eigenpairs of each window.
        windows: Spans of the run with a basis each.
        steps: Steps whose curvature is averaged in each window.
    """

    name: str = "default"
    base: Literal["GGN", "exact"] = "GGN"
    rank: int = 32
    windows: int = 1
    steps: int = 4


@dataclass(frozen=True)
class EnvironmentConfig:
    """What `lmc doctor` looks at besides the environment.

    Attributes:
        folder: Where a log is to go; null looks at none.
    """

    folder: str | None = None


@dataclass(frozen=True)
class DoctorConfig:
    """How thorough `lmc log doctor` is.

    Attributes:
        read_tensors: Read all tensors as `lmc log verify` does; false looks at table, data and model only.
    """

    read_tensors: bool = True


@dataclass(frozen=True)
class PruneConfig:
    """What `lmc log prune` takes out of a log.

    Attributes:
        before: Tensors and snapshots before this step go, but for the snapshot from which it can be reached.
        to_tier: Vectors that this storage tier does not keep go; of `full`, updates are first made from its θ.
        snapshots_every: Of the snapshots the first, the last, those at multiples of this and the first that corrections
            can start from stay.
        batch_data: The tokens of samples go.
        dry_run: Only say what would be freed and what could no longer be forgotten.
    """

    before: int | None = None
    to_tier: Literal["replay", "update"] | None = None
    snapshots_every: int | None = None
    batch_data: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class ReshardConfig:
    """How `lmc log reshard` writes a log anew.

    Attributes:
        output: Folder of the new log.
        ranks: World size it will look as if written by.
        partition: Rule by which parameters are cut, that of ZeRO-3 or that of FSDP2; null keeps the log's.
    """

    output: str | None = None
    ranks: int | None = None
    partition: Literal["zero3", "fsdp2"] | None = None


@dataclass(frozen=True)
class RewriteConfig:
    """How `lmc log rewrite` takes forgotten data out of a log.

    Attributes:
        how: `replay` runs the steps again without the data and makes the log that of this run; `remove` cuts the log off
            before the first step that held any of it.
        dry_run: Only say what would become of it.
    """

    how: Literal["replay", "remove"] | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class PlanConfig:
    """What `lmc plan log` assumes.

    Attributes:
        world_size: Ranks that will train.
        step_seconds: Seconds of a training step without a log, to compare writing with; null compares nothing.
        steps: Optimizer steps; null counts them from the data.
        calibrate: Time the disk and the machine; false predicts sizes only.
    """

    world_size: int = 2
    step_seconds: float | None = None
    steps: int | None = None
    calibrate: bool = True


@dataclass(frozen=True)
class PlanUnlearnConfig:
    """What `lmc plan unlearn` weighs, and where.

    Attributes:
        max_error: Largest rel_error that will do; null recommends what is exact.
        head: Steps of the replayed head that is weighed.
        block: Vectors at once where each forgotten sample has its own; null is as many as fit, 8 at most.
        groups: Parts of the ranks that share these.
        controls: Control deletions to measure errors on; the result stays beside the log and later plans use it.
        candidates: Strategies that are measured on them, as `compare` spells them.
        calibrate: Seconds to spend on timing this machine.
        hardware: Project to `a100`, `h100`, `h200` or `mi300x` in place of timing this machine.
        world_size: Ranks to project to; null is the present number.
        tf32: Projection: products may use TF32.
        steps: Plan without a log: optimizer steps of an imagined run of `model` and `train`, whose settings it takes.
        tokens: Without a log: tokens of a sample; null is data.max_length.
        forgotten: Without a log: samples to forget, evenly over the run.
    """

    max_error: float | None = None
    head: int = 10
    block: int | None = None
    groups: int = 1
    controls: int = 0
    candidates: str = "ggn,exact,10+ggn,10+exact"
    calibrate: float = 10.0
    hardware: str | None = None
    world_size: int | None = None
    tf32: bool = False
    steps: int | None = None
    tokens: int | None = None
    forgotten: int = 1


@dataclass(frozen=True)
class BaselineConfig:
    """What `lmc baseline` trains to forget what `forget` names; its engine is that of `train` (docs/baselines.md).

    Attributes:
        method: `retain` (fine-tuning on retained samples: the control), `ga` (gradient ascent on forgotten ones),
            `graddiff` (that, and descent on retained ones) or `npo` (negative preference optimization).
        start: Folder of a finished unlearning run, or of a model, to start from; null is the end of the log.
        epochs: Passes over the retained samples (`retain`) or the forgotten ones.
        max_steps: Stop after this many optimizer steps; null trains all epochs.
        batch_size: Samples per optimizer step, over all ranks; `graddiff` and `npo` take as many retained ones beside.
        micro_batch_size: Samples per forward pass on one rank; accumulation follows from it.
        optimizer: `adamw` or `sgd`, torch's own.
        learning_rate: Peak learning rate.
        weight_decay: Applied to matrices; vectors (norms, biases) are not decayed.
        schedule: Learning-rate schedule by its transformers name (constant, linear, cosine, ...).
        warmup_steps: Steps of linear warm-up.
        max_grad_norm: Global-norm clipping; 0 turns it off.
        beta: `npo`: inverse temperature β > 0.
        retain_weight: `graddiff`, `npo`: weight α of the loss on retained samples; that on forgotten ones has 1.
        seed: Of order and dropout; null is train.seed.
    """

    method: Literal["retain", "ga", "graddiff", "npo"] = "retain"
    start: str | None = None
    epochs: int = 5
    max_steps: int | None = None
    batch_size: int = 16
    micro_batch_size: int = 8
    optimizer: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    beta: float = 0.1
    retain_weight: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """What `lmc evaluate` compares, on TOFU (`data.path`), for what `forget` names.

    Attributes:
        models: Model folders, or folders of unlearning runs, as `name=folder,name=folder`.
        retrain: The model trained without what is forgotten, which all others are measured against.
        limit: Questions of each set at most, evenly over it; null asks all.
        batch_size: Samples a rank takes through the model at a time.
        generate: Also let the models answer, for ROUGE-L and model utility; each rank then loads the whole model.
        max_new_tokens: Longest answer.
        min_k: Share of the tokens that the min-k and min-k++ attacks look at.
        resamples: Draws of the bootstrap behind the intervals.
    """

    models: str = ""
    retrain: str | None = None
    limit: int | None = None
    batch_size: int = 16
    generate: bool = True
    max_new_tokens: int = 200
    min_k: float = 0.4
    resamples: int = 1000


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases (docs/sweeps.md).

    Attributes:
        project: Where runs go; null tracks nothing.
        name: Of the run; null lets wandb make one up.
        group: Of runs that belong together.
        tags: Separated by commas.
        mode: `online`, `offline` (to disk alone), `disabled`, or `auto`: what WANDB_MODE says, else `offline` where there is
            no key.
    """

    project: str | None = None
    name: str | None = None
    group: str | None = None
    tags: str = ""
    mode: Literal["online", "offline", "disabled", "auto"] = "auto"


@dataclass(frozen=True)
class CellConfig:
    """What `lmc cell` does: one method of a sweep, judged against retraining (docs/sweeps.md).

    Attributes:
        method: `do_nothing`, `retrain`, `replay`, `tim` (first-order rollback), `lmcleaner` (as `unlearn` says), or a
            baseline (`retain`, `ga`, `graddiff`, `npo`, as `baseline` says).
        folder: Of the sweep; cells that agree in training share its logged run, and those that also agree in what is
            forgotten its retrain.
        post_epochs: `lmcleaner`, `tim`, `replay`: passes over retained samples afterwards, as `baseline` says of `retain`.
        evaluate: Ask TOFU's questions too (`evaluate`); false, for other data, gives distances of weights and losses.
        keep_models: Keep the cell's model and correction, which are no longer needed once they are judged.
    """

    method: Literal["do_nothing", "retrain", "replay", "tim", "lmcleaner", "retain", "ga", "graddiff", "npo"] = (
        "lmcleaner"
    )
    folder: str = "runs/sweep"
    post_epochs: int = 0
    evaluate: bool = True
    keep_models: bool = False


@dataclass(frozen=True)
class SweepConfig:
    """What `lmc sweep` runs, a cell after the other; the files are those of `wandb sweep` (docs/sweeps.md).

    Attributes:
        files: Sweep files, separated by commas.
        output: Folder of the sweep: LMC_OUTPUT in the files' commands; null takes that of the environment.
        data: Folder of the data: LMC_DATA; null likewise.
        model: Folder of the model: LMC_MODEL; null likewise.
        ranks: Processes of each cell: LMC_RANKS; null likewise.
        fork: Run each cell as one process on the CPU, forked from the runner, in place of its command line: small cells
            then do not spend most of their time on starting a launcher and importing.
        seed: Of the draws where a file's method is `random`.
        retry: Run cells again that failed in an earlier run.
        part: `i/n`: only every n-th cell, from the i-th on, for n jobs that share a sweep; null runs all.
        remove_logs: Remove the trained models and logs that cells share, once all cells are finished.
        dry_run: Only print the command lines.
    """

    files: str = ""
    output: str | None = None
    data: str | None = None
    model: str | None = None
    ranks: int | None = None
    fork: bool = False
    seed: int = 0
    retry: bool = True
    part: str | None = None
    remove_logs: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class AuditConfig:
    """What a run leaves in its audit chain, and what `lmc audit` checks of it (docs/audit.md).

    Attributes:
        signing_key: PEM file of an Ed25519 private key (`lmc audit keygen`) that signs every record; null signs none.
        public_key: `lmc audit verify`: PEM file of the public key that every record must be signed by.
        salt: File of the secret that ids are hashed with, made where there is none; null is OUTPUT/audit/salt.key.
        keep_marks: Keep the marks of a joint run (unlearn.mark_every) in the output, a copy of its vectors each, so that
            `lmc audit verify` repeats steps from the nearest mark, not from the first source on.
        seed: `lmc audit verify`: picks the step that is repeated; null draws one.
        known: `lmc audit verify`: digest of a record that was seen before and must still be there.
    """

    signing_key: str | None = None
    public_key: str | None = None
    salt: str | None = None
    keep_marks: bool = False
    seed: int | None = None
    known: str | None = None


@dataclass(frozen=True)
class SlurmConfig:
    """What `lmc slurm render` fills in.

    Attributes:
        job: `train`, `unlearn` or `sweep`.
        config: File of settings that the job runs with; null is that of --config.
        arguments: Further options of the job, as on a command line.
        output: File for the script; null prints it.
        name: Of the job; null is lmc-JOB.
        nodes: Nodes.
        ranks_per_node: Processes on each.
        cpus_per_rank: Cores of each process.
        gpus_per_node: GPUs of a node, one a process; 0 asks for none.
        memory: Of a node, as SLURM spells it; null is the site's default.
        partition: Partition; null is the site's default.
        account: Account; null is the user's own.
        time: Time limit, as SLURM spells it; null is the site's.
        array: Tasks of the array (`sweep`).
        launcher: `torchrun`, `deepspeed`, or `srun` (a task a rank).
        grace: Seconds before the time limit at which the job is told to stop.
        logs: Folder for what ranks print, relative to where the job is submitted.
        setup: Shell lines that prepare a node, such as `module load cuda`.
    """

    job: str = "unlearn"
    config: str | None = None
    arguments: str = ""
    output: str | None = None
    name: str | None = None
    nodes: int = 1
    ranks_per_node: int = 8
    cpus_per_rank: int = 8
    gpus_per_node: int = 8
    memory: str | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    array: int = 4
    launcher: Literal["torchrun", "deepspeed", "srun"] = "torchrun"
    grace: int = 120
    logs: str = "logs"
    setup: str = ""


@dataclass(frozen=True)
class ReportConfig:
    """What `lmc report` shows, and where.

    Attributes:
        runs: Folders of finished unlearning runs or of sweeps, separated by commas; runs that differ in their seeds alone
            are shown as mean ± s.d.
        output: Folder for report.html, report.md and report.csv.
        layers: Also compare each run with its log and its reference, parameter by parameter (kept as layers.json in the
            run).
    """

    runs: str = ""
    output: str = "report"
    layers: bool = False


@dataclass(frozen=True)
class Config:
    """A whole run: one file serves training, unlearning and the reference.

    Attributes:
        log_dir: Folder of the trajectory log.
        model_dir: Where training writes the fine-tuned model as a Hugging Face checkpoint; null does not.
        output_dir: Folder that an unlearning run writes.
        reference: What the correction is measured against: `retrain` (a separate training run), `replay`, `none`, or the
            folder of a retrain's log (`lmc train` with the same forget option).
        compare: Further methods measured on the same request: `tim`, `fisher`, `diag`, `low_rank`, `ggn`, `fd`, `exact`,
            `secant`, `replay`, separated by commas; `10+exact` and `auto+exact` replay a head first.
        json: File for what a log command or an evaluation finds.
        plot: Picture of loss, update norm and learning rate (`lmc log inspect`), .png, .svg or .pdf.
        resume: Continue the training run whose log is in log_dir from its last snapshot, or begin it.
        progress: `bar`, `json` (a line a step, for logs) or `none`, of unlearning.
        overwrite: Replace log_dir and model_dir (training), output_dir (unlearning) or the resharded log of an earlier
            run.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    request: RequestConfig = field(default_factory=RequestConfig)
    forget: ForgetConfig = field(default_factory=ForgetConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    reshard: ReshardConfig = field(default_factory=ReshardConfig)
    rewrite: RewriteConfig = field(default_factory=RewriteConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    plan_unlearn: PlanUnlearnConfig = field(default_factory=PlanUnlearnConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    cell: CellConfig = field(default_factory=CellConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    log_dir: str = "runs/log"
    model_dir: str | None = None
    output_dir: str = "runs/unlearn"
    reference: str = "none"
    compare: str = ""
    json: str | None = None
    plot: str | None = None
    resume: bool = False
    progress: Literal["bar", "json", "none"] = "bar"
    overwrite: bool = False
