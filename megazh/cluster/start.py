"""From the command line to running ranks: everything that can be refused is refused here, before anything starts."""

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from megazh.cluster.gpus import Devices, choose_devices, parse_gpu_list
from megazh.cluster.hostfile import Host, is_this_machine, read_hostfile
from megazh.cluster.launch import deepspeed_command, free_port, run_local
from megazh.corpus.pieces import TextDocuments
from megazh.errors import UsageError, WorkerError
from megazh.files import locked
from megazh.index.metadata import load_tokenizer_of
from megazh.index.mixture import Mixture
from megazh.pipeline.precision import Precision, check_deepspeed_version
from megazh.training.checkpoint_list import list_checkpoints, read_manifest
from megazh.training.layout import Layout, make_layout
from megazh.training.precision import check_precision, precision_on
from megazh.training.recipe import Recipe, Resume, load_recipe, recipe_path
from megazh.training.run_folder import RunFolder
from megazh.training.schedule import warmup_steps
from megazh.training.startup import BEGUN, process_begun
from megazh.training.summary import describe_end, describe_layout

DEMO, BIG = "demo", "qwen0.5b_6x3090"


@dataclass(frozen=True)
class Start:
    """What the command line asks for; see `megazh pretrain --help`."""

    kind: str = "ds_pp"
    recipe: str | None = None
    gpus: str | None = None
    count: int | None = None
    stages: int | None = None
    hostfile: Path | None = None
    run: Path | None = None
    inputs: list[str] | None = None
    text_key: str = "text"
    text_documents: TextDocuments | None = None
    device: str | None = None
    dry_run: bool = False
    settings: list[str] = field(default_factory=list)


def start(asked: Start) -> int:
    """Train; returns the exit code.

    Raises:
        MegazhError: what is asked for cannot work; nothing was started.
    """
    if asked.kind == "hf":
        raise UsageError("-t hf comes later; -t ds_pp trains through DeepSpeed's pipeline (also with one stage: -p 1)")
    path = recipe_path(asked.recipe or (DEMO if asked.gpus is None or asked.inputs else BIG))
    recipe, prepared = _with_data(load_recipe(path, asked.settings), asked)
    run = RunFolder(asked.run or Path("runs") / (prepared.name if asked.inputs else path.stem))
    hosts = read_hostfile(asked.hostfile) if asked.hostfile else []
    devices = _devices(asked, hosts, recipe)
    stages = _stages(asked, devices, recipe)
    layout = make_layout(recipe, devices.ranks, stages)
    check_deepspeed_version(version("deepspeed"))
    check_precision(recipe, layout, devices.kind)
    warmup_steps(recipe.total_steps, recipe.warmup)
    rank = ["rank", str(run.path.resolve()), "--stages", str(layout.stages), "--device", devices.kind]
    # On other hosts their own launcher; None: this machine, where run_local starts the ranks.
    remote = None
    if asked.hostfile and not is_this_machine(hosts):
        slots = parse_gpu_list(asked.gpus) if asked.gpus else None
        remote = deepspeed_command(asked.hostfile, hosts, slots, free_port(), rank)
    if devices.note:
        _say(devices.note)
    if asked.dry_run:
        _dry_run(recipe, layout, devices, run, remote or [f"{layout.ranks} x python", "-m", "megazh", *rank])
        return 0
    _refuse_changed_layout(run, layout, recipe, precision_on(recipe, devices.kind))
    if run.exists:
        run.check_recipe(recipe)
    if asked.inputs:
        _prepare(recipe, prepared, asked)
    if _complete(run, recipe):
        _describe_end(run, recipe, asked)
        return 0
    mixture = _open_mixture(recipe, prepared, asked)
    with locked(run.lock, f"{run.path}: another job is training in this folder"):
        run.begin(recipe, mixture)
        for line in describe_layout(recipe, layout, devices.kind, run):
            print(line, flush=True)
        code = _launch_on_hosts(remote) if remote else _launch(rank, devices, layout, run)
    if code == 0 and not _complete(run, recipe):
        raise WorkerError(f"{run.path}: the ranks ended before the run was complete; run the same command again")
    if code == 0:
        _describe_end(run, recipe, asked)
    return code


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _with_data(recipe: Recipe, asked: Start) -> tuple[Recipe, Path]:
    """The recipe with the manifest that -i will make, and the folder in which data is prepared."""
    if asked.inputs is None:
        return recipe, Path(recipe.data.manifest).parent
    if not asked.inputs:
        raise UsageError("-i: expected files or folders of text")
    if any(setting.removeprefix("--").startswith("data.manifest=") for setting in asked.settings):
        raise UsageError("-i makes a manifest of its own, and data.manifest names another; give one of them")
    folder = Path("data_index") / (asked.run.name if asked.run else _name_of(asked.inputs[0]))
    data = recipe.data.model_copy(update={"manifest": str(folder / "mixture.yaml"), "stories": None})
    return recipe.model_copy(update={"data": data}), folder


def _name_of(text: str) -> str:
    """`books` of `books.jsonl.gz`, `books/` and `books/*.txt`."""
    for part in reversed(Path(text).parts):
        name = part.split(".")[0]
        if name and not any(wild in part for wild in "*?[") and part not in ("..", "/"):
            return name
    return "text"


def _devices(asked: Start, hosts: list[Host], recipe: Recipe) -> Devices:
    if not hosts or is_this_machine(hosts):
        count = asked.count or (hosts[0].slots if hosts and asked.gpus is None else None)
        return choose_devices(asked.device, asked.gpus, count, recipe.gpus)
    slots = parse_gpu_list(asked.gpus) if asked.gpus else None
    ranks = sum(len(slots) if slots is not None else host.slots for host in hosts)
    if asked.count not in (None, ranks):
        raise UsageError(f"-n {asked.count}, but the hosts of -H {asked.hostfile} give {ranks} GPUs; leave -n out")
    return Devices("cpu" if asked.device == "cpu" else "cuda", ranks, None)


def _stages(asked: Start, devices: Devices, recipe: Recipe) -> int:
    """The recipe's stages; one, and said so, where nobody chose the GPUs and there are too few."""
    if asked.stages is not None:
        return asked.stages
    chosen = asked.gpus is not None or asked.count is not None or asked.hostfile is not None
    if not chosen and devices.ranks % recipe.pipe_parallel_size:
        unit = "GPU" if devices.ranks == 1 else "GPUs"
        _say(f"{devices.ranks} {unit} here, and the recipe has {recipe.pipe_parallel_size} pipeline stages: taking one")
        return 1
    return recipe.pipe_parallel_size


def _refuse_changed_layout(run: RunFolder, layout: Layout, recipe: Recipe, precision: Precision) -> None:
    checkpoints = list_checkpoints(run.checkpoints)
    if recipe.resume is Resume.NEVER and (checkpoints or run.exists):
        raise UsageError(f"{run.path}: holds a run already, and resume=never; give another folder with -r")
    if checkpoints:
        saved = read_manifest(checkpoints[-1])
        if (saved.stages, saved.replicas) != (layout.stages, layout.replicas):
            raise UsageError(
                f"{checkpoints[-1]}: was saved by {saved.stages} stages x {saved.replicas} replicas, and this is "
                f"{layout.stages} x {layout.replicas}; resume with "
                f"-n {saved.stages * saved.replicas} -p {saved.stages}, or begin another run with -r"
            )
        if saved.precision != precision:
            raise UsageError(
                f"{checkpoints[-1]}: was saved in {saved.precision}, and this is {precision} (precision=auto follows "
                "the device); go on with the same, or begin another run with -r"
            )
        if recipe.stage_bounds not in (None, saved.bounds):
            raise UsageError(
                f"{checkpoints[-1]}: was saved with stage_bounds {saved.bounds}, and this run asks for "
                f"{recipe.stage_bounds}; leave stage_bounds out, or begin another run with -r"
            )


def _complete(run: RunFolder, recipe: Recipe) -> bool:
    checkpoints = list_checkpoints(run.checkpoints)
    return bool(checkpoints) and read_manifest(checkpoints[-1]).step >= recipe.total_steps


def _prepare(recipe: Recipe, folder: Path, asked: Start) -> None:
    """Make data from the text of -i, or from stories; where it is there already, check it."""
    from megazh.training.prepare import prepare

    prepare(
        folder,
        recipe.model.vocab_size,
        recipe.seed,
        asked.inputs,
        asked.text_key,
        asked.text_documents,
        recipe.data.stories or 1,
        say=lambda line: print(line, flush=True),
    )


def _open_mixture(recipe: Recipe, folder: Path, asked: Start) -> Mixture:
    """The mixture, made first where the recipe says from what; checked against the model and the length."""
    data, manifest = recipe.data, Path(recipe.data.manifest)
    if data.stories and not manifest.exists():
        _prepare(recipe, folder, asked)
    if not manifest.exists() and not Path(f"{manifest}.idx").exists():
        prefix = manifest.with_suffix("")
        raise UsageError(
            f"data.manifest {manifest}: no such file; make an index with 'python tools/index_dataset.py --input TEXT "
            f"--tokenizer TOKENIZER --output {prefix}' and give data.manifest={prefix} (docs/data.md: mixtures)"
        )
    mixture = Mixture(data.manifest, recipe.seq_len, data.packing, data.max_docs)
    ids, rows = mixture.corpora[0].metadata.tokenizer.vocab_size, recipe.model.vocab_size
    if ids > rows:
        raise UsageError(
            f"the tokenizer of {manifest} has ids up to {ids - 1}, and the model has {rows} rows: set "
            f"model.vocab_size={-(-ids // 64) * 64}, or index with the recipe's tokenizer"
        )
    tokenizer = load_tokenizer_of(mixture.corpora[0].prefix, mixture.corpora[0].metadata)
    for prompt in recipe.sample_prompts:
        if not tokenizer.encode(prompt):
            raise UsageError(f"sample_prompts: {prompt!r} has no token to go on from; give at least one character")
    needed = recipe.total_steps * recipe.global_batch_size
    if mixture.end is not None and needed > mixture.end:
        steps = mixture.end // recipe.global_batch_size
        raise UsageError(
            f"the run takes {needed:,} samples, and {manifest} ends after {mixture.end:,} (on_exhausted: stop); set "
            f"{f'steps={steps}, or ' if steps else ''}on_exhausted: wrap"
        )
    return mixture


def _launch(command: list[str], devices: Devices, layout: Layout, run: RunFolder) -> int:
    labels = [f"rank {rank} (stage {rank // layout.replicas})" for rank in range(layout.ranks)]
    python_path = str(Path(__file__).resolve().parents[2])
    env = {
        BEGUN: str(process_begun()),
        "PYTHONPATH": os.pathsep.join(filter(None, (python_path, os.environ.get("PYTHONPATH")))),
        # torch warns that NCCL guesses a rank's device; each rank has set its own.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
    }
    return run_local(["-m", "megazh", *command], layout.ranks, env, devices.ids, run.logs, labels)


def _launch_on_hosts(command: list[str]) -> int:
    """Run DeepSpeed's launcher to its end; it decides how its ranks end, and on a signal they do not get to save."""
    process = subprocess.Popen(command)

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGINT)  # and wait: this process holds the lock of the run folder

    before = {each: signal.signal(each, forward) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = process.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if code:
        raise WorkerError(
            f"DeepSpeed's launcher ended with exit code {code}; what the ranks said is above; run the same command "
            "again to go on from the last checkpoint"
        )
    return 0


def _dry_run(recipe: Recipe, layout: Layout, devices: Devices, run: RunFolder, command: list[str]) -> None:
    for line in describe_layout(recipe, layout, devices.kind, run, detailed=True):
        print(line)
    print(f"{'precision':<12}{precision_on(recipe, devices.kind)}")
    if devices.ids:
        print(f"{'GPUs':<12}{','.join(devices.ids)}")
    missing = "" if Path(recipe.data.manifest).exists() else " (not there yet)"
    print(f"{'data':<12}{recipe.data.manifest}{missing}")
    print(f"{'command':<12}{' '.join([command[0], shlex.join(command[1:])])}")
    print("dry run: nothing was started")


def _describe_end(run: RunFolder, recipe: Recipe, asked: Start) -> None:
    kept = [text for text in asked.settings if not text.removeprefix("--").startswith(("steps=", "tokens=", "resume="))]
    longer = replace(asked, settings=[*kept, f"steps={2 * recipe.total_steps}"])
    anew = replace(asked, run=run.path.with_name(f"{run.path.name}-2"))
    for line in describe_end(run, recipe, _command(longer), _command(anew)):
        print(line)


def _command(asked: Start) -> str:
    """The command line that asks for this."""
    script = Path("jobs") / "run_pretrain.sh"
    if not script.exists():  # called from another folder
        script = Path(__file__).resolve().parents[2] / script
    words = ["bash", str(script), "-t", asked.kind]
    options = {
        "-c": asked.recipe, "-g": asked.gpus, "-n": asked.count, "-p": asked.stages, "-H": asked.hostfile,
        "-r": asked.run, "--device": asked.device,
    }  # fmt: skip
    if asked.inputs:
        options |= {"--text-key": asked.text_key, "--text-documents": asked.text_documents}
    for name, value in options.items():
        if value is not None:
            words += [name, str(value)]
    if asked.inputs:
        words += ["-i", *asked.inputs]
    return shlex.join([*words, *asked.settings])
