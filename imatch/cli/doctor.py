"""Is this machine ready? One line a thing: OK, or what to do.

    imatch doctor          driver, CUDA, GPU, memory, folders, weights, disk, port
    imatch doctor --cpu    the same without a GPU
    imatch doctor STEP     every file of a finished step, or of those in a folder: is it what was written?

`--` marks what is not there and is needed only for what the line says. The exit code is 0 when nothing is to be fixed,
1 when something is, 3 when torch cannot use a GPU: everything then runs on the CPU, slower.
"""

from __future__ import annotations

import http.client
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from imatch.core import compute, files, settings
from imatch.core.step import open_step
from imatch.core.types import ImatchError, StepError
from imatch.data import registry
from imatch.steps import checks
from imatch.steps.chain import steps_below

ENOUGH = 2.0
"""GB of memory, of a GPU's memory and of disk that a small run needs."""
NO_GPU = 3
Check = tuple[str, Callable[[], str]]
"""A subject, and the function that returns what is to be said of it, or raises an ImatchError that says what to do."""


class NotThereError(ImatchError):
    """Something that is absent, and needed only for what the message says."""


def _nvidia_smi() -> ElementTree.Element:
    command = shutil.which("nvidia-smi")
    if command is None:
        raise ImatchError(
            "no nvidia-smi: install NVIDIA's driver (on Windows in Windows itself, not in WSL; on Linux also the "
            "NVIDIA container toolkit), or work without a GPU (docker/compose.cpu.yaml, doctor --cpu)"
        )
    try:
        done = subprocess.run([command, "-q", "-x"], capture_output=True, text=True, timeout=60, check=True)
        return ElementTree.fromstring(done.stdout)
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).strip().splitlines() or [f"exit code {error.returncode}"]
        raise ImatchError(f"{command} fails: {said[-1]}; restart the machine, else install the driver anew") from error
    except subprocess.TimeoutExpired as error:
        raise ImatchError(f"{command} does not answer: restart the machine (on Windows: wsl --shutdown)") from error
    except ElementTree.ParseError as error:
        raise ImatchError(f"{command} -q -x prints no XML: install NVIDIA's own driver") from error


def _driver() -> ElementTree.Element:
    """The same, for the lines below that of the driver, which has said why."""
    try:
        return _nvidia_smi()
    except ImatchError as error:
        raise ImatchError("no driver to ask: look at the line of the driver") from error


def driver() -> str:
    """The driver and the GPUs that it sees."""
    told = _nvidia_smi()
    gpus = [gpu.findtext("product_name", "a GPU without a name") for gpu in told.iter("gpu")]
    if not gpus:
        raise ImatchError("the driver sees no GPU: is it seated, and switched on in the BIOS and the device manager?")
    return f"{told.findtext('driver_version')}, {', '.join(gpus)}"


def cuda() -> str:
    """Torch's CUDA, and whether the driver is new enough for it (the same major version is)."""
    import torch

    if torch.version.cuda is None:
        raise ImatchError("torch was built without CUDA: build the image with FAISS=gpu, or use doctor --cpu")
    able = _driver().findtext("cuda_version", "")
    if not able or int(able.split(".")[0]) < int(torch.version.cuda.split(".")[0]):
        raise ImatchError(f"torch wants CUDA {torch.version.cuda}, the driver has {able or 'none'}: update the driver")
    return f"{torch.version.cuda}, the driver has {able}"


def torch_gpu() -> str:
    """Whether torch multiplies on each GPU, which is more than seeing it."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if not torch.cuda.is_available():
            why = f" ({str(told[0].message).splitlines()[0]})" if told else ""
            raise ImatchError(f"torch sees no GPU{why}: look at the lines above; everything runs on the CPU, slower")
    try:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        for i in range(len(names)):
            (torch.ones(8, 8, device=f"cuda:{i}") @ torch.ones(8, 8, device=f"cuda:{i}")).cpu()
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ImatchError(f"torch sees a GPU and cannot compute on it ({said}): update the driver") from error
    return f"{torch.__version__} computes on {', '.join(names)}"


def faiss_gpu() -> str:
    """Whether FAISS sees the GPUs."""
    import faiss

    if not (there := faiss.get_num_gpus()):
        raise ImatchError(
            "FAISS sees no GPU: if torch does, faiss-cpu is installed: build the image with FAISS=gpu (outside of it: "
            "make setup FAISS=gpu); searches run on the CPU"
        )
    return f"{faiss.__version__} sees {there} GPU{'s' if there > 1 else ''}"


def gpu_memory() -> str:
    """What is free on the GPU that has most."""
    told = [gpu.findtext("fb_memory_usage/free", "N/A") for gpu in _driver().iter("gpu")]
    free = [float(text.removesuffix(" MiB")) / 1024 for text in told if text.endswith(" MiB")]
    if not free:
        raise NotThereError("the driver does not tell what is free (GPUs that share the machine's memory)")
    if max(free) < ENOUGH:
        raise ImatchError(
            f"{max(free):.1f} GB free, {ENOUGH:.0f} wanted: close what else uses the GPU (nvidia-smi names it; in "
            "JupyterLab: Kernel > Shut Down All Kernels)"
        )
    return f"{', '.join(f'{one:.1f}' for one in free)} GB free"


def torch_cpu() -> str:
    """Whether torch works at all."""
    import torch

    (torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
    return f"{torch.__version__}, on {settings.cores()} cores"


def faiss_cpu() -> str:
    """Whether FAISS works at all."""
    import faiss

    return str(faiss.__version__)


def memory() -> str:
    """What is free of the machine's memory."""
    free = compute.free_memory() / 2**30
    if free < ENOUGH:
        raise ImatchError(
            f"{free:.1f} GB free, {ENOUGH:.0f} wanted: close other programs; on Windows, give WSL more (memory= in "
            ".wslconfig)"
        )
    return f"{free:.1f} GB free"


def _writable(folder: Path, remedy: str) -> None:
    # permission bits do not tell of read-only mounts
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ImatchError(f"{folder} cannot be written to ({error.strerror}): {remedy}") from error


def _nearest(folder: Path) -> Path:
    """The folder itself, or what is there of those above: the first run makes the rest."""
    return next(above for above in (folder, *folder.parents) if above.exists())


def project() -> str:
    """The notebooks are there, and JupyterLab can save them."""
    here = settings.workspace()
    if not (here / "notebooks" / "01_embed.ipynb").is_file():
        raise ImatchError(
            f"no notebooks in {here}: set PROJECT_HOST in docker/.env to the folder of imatch, or cd to it"
        )
    _writable(here / "notebooks", "notebooks cannot be saved; share the folder, or set HOST_UID to who owns it (id -u)")
    return str(here)


def readable(variable: str, host: str, needed_for: str) -> str:
    """A root that is read, such as DATASET_ROOT (`host` in docker/.env): there, listable and not empty."""
    folder = settings.root(variable)
    said = f"set {host} in docker/.env, or {variable}, to the folder that has it"
    try:
        if not folder.exists():
            raise NotThereError(f"no folder {folder}: needed for {needed_for}; {said}")
        count = len([path for path in folder.iterdir() if not path.name.startswith(".")])
    except OSError as error:
        raise ImatchError(
            f"{folder} cannot be read ({error.strerror}): {said}; share it with Docker (Settings > Resources > File "
            "sharing), or set HOST_UID to who owns it (id -u)"
        ) from error
    if not count:
        raise NotThereError(f"{folder} is empty: needed for {needed_for}; {said}")
    return f"{folder}, {count} inside"


def exports() -> str:
    """EXPORT_ROOT can be written to."""
    folder = settings.root("EXPORT_ROOT")
    remedy = "set EXPORT_HOST in docker/.env, or EXPORT_ROOT, to a folder of yours, or HOST_UID to who owns it (id -u)"
    _writable(_nearest(folder), remedy)
    return str(folder)


def disk() -> str:
    """What is free where results go."""
    folder = settings.root("EXPORT_ROOT")
    free = shutil.disk_usage(_nearest(folder)).free / 2**30
    if free < ENOUGH:
        raise ImatchError(
            f"{free:.1f} GB free at {folder}, {ENOUGH:.0f} wanted: delete old runs, or choose another disk"
        )
    return f"{free:.1f} GB free at {folder}"


def weights(data_key: str) -> str:
    """The weights of the registry that are there, and that each is the file that its name says."""
    folder = settings.root("WEIGHTS_ROOT")
    known = registry.load(data_key).weights
    looked = [(weight.key, *checks.weight_file(weight.filename)) for weight in known]
    wrong = [f"{key}: {said}" for key, there, _, said in looked if there == "WRONG" or ", but " in said]
    if wrong:
        raise ImatchError("; ".join(wrong))
    found = [key for key, there, _, _ in looked if there == "found"]
    if not found:
        raise NotThereError(
            f"none of the {len(known)} of {data_key} in {folder}: needed for DINOv3 (sift needs none); put Meta's "
            "files there, or set WEIGHTS_HOST in docker/.env (WEIGHTS_ROOT outside) to where they are"
        )
    return f"{', '.join(found)} in {folder}, each as its name says"


def port() -> str:
    """Nothing answers at the port, or JupyterLab does. Inside a container it is the container's."""
    number = settings.jupyter_port()
    with closing(http.client.HTTPConnection("127.0.0.1", number, timeout=5)) as program:  # by no proxy
        try:
            program.request("GET", "/api")
            said = program.getresponse().read(1000)
        except ConnectionRefusedError:
            return f"{number} is free"
        except (OSError, http.client.HTTPException):
            said = b""
    if b'"version"' in said:
        return f"{number}: JupyterLab answers"
    raise ImatchError(f"{number} is taken by another program: set JUPYTER_PORT in docker/.env, or here, to a free one")


def variables() -> str:
    """No variable is set that older containers had and nobody reads."""
    if old := settings.replaced():
        raise ImatchError("; ".join(f"{name} is not read any more: use {said}" for name, said in old.items()))
    return "none of older containers"


GPU: tuple[Check, ...] = (
    ("driver", driver),
    ("CUDA", cuda),
    ("torch", torch_gpu),
    ("FAISS", faiss_gpu),
    ("GPU memory", gpu_memory),
)
CPU: tuple[Check, ...] = (("torch", torch_cpu), ("FAISS", faiss_cpu))
ALWAYS: tuple[Check, ...] = (
    ("memory", memory),
    ("project", project),
    ("data sets", partial(readable, "DATASET_ROOT", "DATASET_HOST", "data sets by name")),
    ("references", partial(readable, "REFERENCE_ROOT", "REFERENCE_HOST", "references made elsewhere")),
    ("DINOv3 code", partial(readable, "DINOV3_REPO", "CODE_HOST", "source hub only (timm needs none)")),
    ("exports", exports),
    ("disk", disk),
    ("port", port),
    ("variables", variables),
)


def examine(check: Callable[[], str]) -> tuple[str, str]:
    """Carry out one check.

    Returns:
        "OK", "--" (absent, and needed only for what is said) or "FIX", and what is to be said.

    >>> examine(lambda: "580.65")
    ('OK', '580.65')
    """
    try:
        return "OK", check()
    except NotThereError as absent:
        return "--", str(absent)
    except ImatchError as error:
        return "FIX", str(error)
    except Exception as error:  # a library that is broken in whatever way is a finding, too
        return "FIX", f"{type(error).__name__}: {error}; build the image anew (outside of it: make clean setup)"


def whole(folder: Path) -> str:
    """Read every file of a finished step, and of the indices beside it: each must be what was written.

    Raises:
        NotThereError: it is not finished, or of an earlier version, so nothing is known of its files.
        ImatchError: files are damaged; the message names each.
    """
    step = open_step(folder, finished=False)
    if not (step.finished and step.sealed):
        why = "it was made by an earlier version" if step.finished else "it is not finished"
        raise NotThereError(f"no digests are known, for {why}")
    harmed, known = step.damage(again=True), list(step.sealed.values())
    remedies = [files.RECOMPUTE] if harmed else []
    for path in folder.glob("index/*/index.json"):
        sealed = files.read_json(path, signed=True).get("files", {})
        lost = files.damage(path.parent, sealed, again=True)
        harmed |= {f"{path.parent.relative_to(folder).as_posix()}/{name}": reason for name, reason in lost.items()}
        remedies += [f"delete {path.parent} and run 03_index again"] if lost else []
        known += sealed.values()
    if harmed:
        lines = "".join(f"\n     {files.printable(name)}: {reason}" for name, reason in harmed.items())
        raise StepError(f"{len(harmed)} of {len(known)} files are damaged: {', '.join(remedies)}{lines}")
    size = sum(int(was.partition(" ")[0]) for was in known)
    return f"{len(known)} files, {size / 2**20:.1f} MB, all as written"


def steps(folder: Path) -> int:
    """Print a line for each step in a folder (`whole`).

    Returns:
        0 when no file is damaged, else 1.

    Raises:
        ImatchError: there is no step.
    """
    found = [(below, *examine(partial(whole, below))) for below in steps_below(folder)]
    if not found:
        raise ImatchError(f"no step in {folder}: give the folder of one, or one that holds some, such as exports/demo")
    for below, state, said in found:
        print(f"{state:4} {below}: {said}")
    return int(any(state == "FIX" for _, state, _ in found))


def main(cpu: bool, data_key: str) -> int:
    """Print a line for each check.

    Args:
        cpu: expect no GPU.
        data_key: registry of data sets and weights.

    Returns:
        0 when nothing is to be fixed, 1 when something is, `NO_GPU` when torch cannot use a GPU.
    """
    table = (*(CPU if cpu else GPU), *ALWAYS, ("weights", partial(weights, data_key)))
    found: dict[str, Any] = {}
    for subject, check in table:
        found[subject], said = examine(check)
        print(f"{found[subject]:4} {subject:12} {said}", flush=True)
    to_fix = [subject for subject, state in found.items() if state == "FIX"]
    print(f"to fix: {', '.join(to_fix)}" if to_fix else "ready")
    if "torch" in to_fix and not cpu:
        return NO_GPU
    return 1 if to_fix else 0
